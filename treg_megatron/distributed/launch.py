"""Ranks started by torchrun or srun: this process's rank, the world size, and the process group."""

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
class RankInfo:
    """This process's place among the processes of a job; without a launcher, the only one of one."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.size // self.local_size


def was_launched() -> bool:
    """Whether torchrun, or srun with several tasks, started this process."""
    under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_WORLD_SIZE" in os.environ
    return under_torchrun or _under_srun()


def _under_srun() -> bool:
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def rank_info() -> RankInfo:
    """The ranks of the job, from the launcher's environment variables.

    Raises:
        UserError: nodes have different numbers of processes.
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
        return RankInfo(0, 1, 0, 1)
    if uneven:
        raise UserError(f"{size} processes do not divide evenly over their nodes: start the same number on every node")
    return RankInfo(rank, size, local_rank, local_size)


def node_name() -> str:
    """This machine's name; under Slurm, the name that Slurm uses."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def init_process_group(ranks: RankInfo, timeout: float, store: "torch.distributed.Store | None" = None) -> None:
    """Initialise the process group before NeMo does: NCCL with GPUs, otherwise gloo.

    Args:
        ranks: the processes of the job.
        timeout: seconds after which a collective fails.
        store: the result of :func:`connect_store`, if it was called before.

    Raises:
        UserError: the port is taken, rank 0's address is unknown, or ranks did not connect in time.
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
        store=store or connect_store(ranks),
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=timedelta(seconds=timeout),
    )


def connect_store(ranks: RankInfo) -> "torch.distributed.Store":
    """A key-value store that all ranks share; rank 0 serves it at MASTER_ADDR:MASTER_PORT.

    Raises:
        UserError: as for :func:`init_process_group`.
    """
    import torch.distributed as dist

    if ranks.size == 1:
        return dist.HashStore()
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if address is None or port is None:
        raise UserError(
            f"{ranks.size} processes need MASTER_ADDR and MASTER_PORT, the address of rank 0; "
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


def _why_not_connected(message: str, address: str, port: str, ranks: RankInfo) -> str:
    if "EADDRINUSE" in message or "address already in use" in message.lower():
        return f"port {port} of {node_name()} is taken by another program: set MASTER_PORT to a free one"
    if "clients joined" in message:
        return (
            f"not all of {ranks.size} processes connected within {JOIN_SECONDS} s "
            f"({message.split('seconds ')[-1].splitlines()[0]}): look for errors of the other ranks above"
        )
    return f"rank {ranks.rank} on {node_name()} cannot reach rank 0 at {address}:{port}: {message.splitlines()[0]}"


def destroy_process_group() -> None:
    """Destroy the process group on all ranks at once: rank 0 serves the store, and threads must end before Python."""
    import torch.distributed as dist

    dist.barrier()
    dist.destroy_process_group()


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its result on every rank; requires the process group.

    Raises:
        UserError: on every rank, if rank 0's ``action`` raised it or an OSError.
    """
    import torch.distributed as dist

    outcome: list = [None, None]
    if rank_info().rank == 0:
        try:
            outcome[0] = action()
        except (UserError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]
