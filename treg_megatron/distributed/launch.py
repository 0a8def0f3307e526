"""One process per rank, started by torchrun or by srun: who am I, how many are we, and the group that we form."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from treg_megatron.errors import UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
JOIN_SECONDS = 600  # a node may still be reading Python's files from a busy disk while others wait


@dataclass(frozen=True)
class World:
    """The processes of a job. Without a launcher: one process that is its own world."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def nodes(self) -> int:
        return self.size // self.local_size


def was_launched() -> bool:
    """Whether torchrun, or srun with several tasks, started this process."""
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    return under_torchrun or _under_srun()


def _under_srun() -> bool:
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def world() -> World:
    """Read the launcher's environment.

    Raises:
        UserError: nodes with different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_WORLD_SIZE" in os.environ:  # torchrun
        rank, size, local_rank, local_size = (
            int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        uneven = size % local_size
    elif _under_srun():
        rank, size, local_rank, nodes = (
            int(os.environ[name]) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NNODES")
        )
        local_size, uneven = size // nodes, size % nodes
    else:
        return World(0, 1, 0, 1)
    if uneven:
        raise UserError(f"{size} processes do not divide evenly into their nodes: start the same number on every node")
    return World(rank, size, local_rank, local_size)


def node_name() -> str:
    """This machine's name, as Slurm knows it where Slurm runs it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def join(ranks: World, timeout: float, store: "torch.distributed.Store | None" = None) -> None:
    """Form the process group that NeMo then finds ready: NCCL on GPUs, gloo without.

    Args:
        timeout: seconds that a collective may take before it fails.
        store: what :func:`connect` gave, if it was called before.

    Raises:
        UserError: the port is taken, rank 0's address is unknown, or ranks did not come.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(ranks.local_rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store or connect(ranks),
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=timedelta(seconds=timeout),
    )


def connect(ranks: World) -> "torch.distributed.Store":
    """A key-value store that all ranks share; rank 0 serves it at MASTER_ADDR:MASTER_PORT.

    Raises:
        UserError: as :func:`join`.
    """
    import torch.distributed as dist

    if ranks.size == 1:
        return dist.HashStore()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        raise UserError(
            f"{ranks.size} processes need MASTER_ADDR and MASTER_PORT, where rank 0 is to be found; "
            "torchrun and the scripts in slurm/ set them"
        )
    # torchrun's own agent serves the store for its workers
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            address,
            int(port),
            ranks.size,
            is_master=ranks.rank == 0 and not served,
            timeout=timedelta(seconds=JOIN_SECONDS),
            wait_for_workers=not served,
        )
        return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise UserError(_why_not_connected(str(error), address, port, ranks)) from None


def _why_not_connected(message: str, address: str, port: str, ranks: World) -> str:
    if "EADDRINUSE" in message or "address already in use" in message.lower():
        return f"port {port} of {node_name()} is taken by another program: set MASTER_PORT to a free one"
    if "clients joined" in message:
        return (
            f"not all of {ranks.size} processes came within {JOIN_SECONDS} s "
            f"({message.split('seconds ')[-1].splitlines()[0]}): look for errors of the others above"
        )
    return f"rank {ranks.rank} on {node_name()} cannot reach rank 0 at {address}:{port}: {message.splitlines()[0]}"


def leave() -> None:
    """End the group, all ranks together: rank 0 serves the store, and the group's threads must end before Python does."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def on_rank_zero(action: Callable[[], T]) -> T:
    """What ``action`` gives on rank 0, on every rank; the group has been joined.

    Raises:
        UserError: on every rank, if rank 0's ``action`` raised it or an OSError.
    """
    import torch.distributed as dist

    outcome: list = [None, None]
    if world().rank == 0:
        try:
            outcome[0] = action()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
