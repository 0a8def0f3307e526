"""Ranks started by torchrun, srun or MPI: this process's rank, the world size, and the process group."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, TypeVar

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


class Launcher(NamedTuple):
    """Environment variables of a launcher; of several names, the first that is set counts."""

    name: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]

    @property
    def started(self) -> int:
        """Number of processes that it started."""
        return _number(self.size) or 1


TORCHRUN = Launcher("torchrun", ("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",))
PLAIN = TORCHRUN._replace(name="a launcher with RANK and WORLD_SIZE")  # Kubeflow without torchrun
# a job's batch script has SLURM_NTASKS, too: only the tasks of a step were started by srun
SRUN = Launcher("srun", ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",), ("SLURM_LOCALID",), ())
MPI = (
    Launcher(
        "Open MPI",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "jsrun",
        ("JSM_NAMESPACE_RANK",),
        ("JSM_NAMESPACE_SIZE",),
        ("JSM_NAMESPACE_LOCAL_RANK",),
        ("JSM_NAMESPACE_LOCAL_SIZE",),
    ),
    Launcher(
        "an MPI launcher",  # MPICH, Intel MPI, Cray PALS
        ("PMI_RANK", "PALS_RANKID"),
        ("PMI_SIZE",),
        ("PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "MPI_LOCALRANKID"),
        ("PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE", "MPI_LOCALNRANKS"),
    ),
)


def was_launched() -> bool:
    """Whether torchrun, or another launcher of several processes, started this process."""
    return _launcher() is not None


def require_single_process(what: str) -> None:
    """Refuse to run ``what`` as several processes, which would all do the same and write the same files.

    Raises:
        UserError: a launcher started several.
    """
    launcher = _launcher()
    if launcher and launcher.started > 1:
        raise UserError(
            f"{what} is a single process, and {launcher.name} started {launcher.started}: start one (srun --ntasks=1)"
        )


def rank_info() -> RankInfo:
    """The ranks of the job, from the launcher's environment variables.

    Raises:
        UserError: nodes have different numbers of processes, or the launcher does not say what ranks must know.
    """
    launcher = _launcher()
    if launcher is None:
        return RankInfo(0, 1, 0, 1)
    size, rank, local_rank, local_size = (
        _number(names) for names in (launcher.size, launcher.rank, launcher.local_rank, launcher.local_size)
    )
    if launcher is SRUN:
        nodes = int(os.environ["SLURM_STEP_NUM_NODES"])
        local_size, uneven = size // nodes, size % nodes
    else:
        if launcher is PLAIN and local_rank is None and local_size is None:
            local_rank, local_size = 0, 1  # each in a pod of its own
        has_address = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
        if None in (rank, local_rank, local_size) or not (launcher is TORCHRUN or has_address):
            raise UserError(
                f"{launcher.name} started {size} processes that do not know each other: set MASTER_ADDR and "
                "MASTER_PORT (of rank 0) for all and RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE for each, or use "
                "torchrun or srun"
            )
        uneven = size % local_size
    if uneven:
        raise UserError(f"{size} processes do not divide evenly over their nodes: start the same number on every node")
    return RankInfo(rank, size, local_rank, local_size)


def _launcher() -> Launcher | None:
    """What started this process as one of several; torchrun also with one."""
    if "TORCHELASTIC_RUN_ID" in os.environ or all(os.environ.get(names[0]) for names in TORCHRUN[1:]):
        return TORCHRUN
    # mpirun may start its daemons with srun; srun --mpi=pmi2 sets PMI_SIZE
    for launcher in MPI:
        if launcher.started > 1 and launcher.started != SRUN.started:
            return launcher
    return next((launcher for launcher in (SRUN, PLAIN) if launcher.started > 1), None)


def _number(names: tuple[str, ...]) -> int | None:
    return next((int(os.environ[name]) for name in names if os.environ.get(name)), None)


def device_index(local_rank: int) -> int:
    """The CUDA device of a process among those that it sees: all of its node's or, as with ``srun --gpus-per-task=1``,
    only its own."""
    import torch

    return local_rank % torch.cuda.device_count()


def require_device(device: str) -> None:
    """Require a usable GPU if the recipe is meant for GPUs, instead of training on the CPU without a word.

    Args:
        device: ``cluster.device``.

    Raises:
        UserError: torch sees no GPU that it can use.
    """
    import torch

    if device == "gpu" and not torch.cuda.is_available():
        raise UserError(
            f"the recipe is meant for GPUs (cluster.device=gpu), but on {node_name()} torch sees none that it can use: "
            "look at nvidia-smi, install a torch with CUDA, or set cluster.device=cpu"
        )


def take_device(ranks: RankInfo) -> None:
    """Make this process's GPU the current CUDA device; nothing without GPUs.

    Raises:
        UserError: it cannot be used.
    """
    import torch

    if not torch.cuda.is_available():
        return
    index = device_index(ranks.local_rank)
    try:
        torch.cuda.set_device(index)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"GPU {index} of {node_name()} cannot be used: {reason}; exclude the node, sbatch --exclude"
        ) from None


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
        UserError: the port is taken, rank 0's address is unknown, ranks did not connect in time, a GPU cannot be used,
            or only some ranks have one.
    """
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    take_device(ranks)
    store = store or connect_store(ranks)
    cuda = torch.cuda.is_available()
    require_same_device(ranks, store, "GPU" if cuda else "CPU")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=timedelta(seconds=timeout),
    )


def require_same_device(ranks: RankInfo, store: "torch.distributed.Store", device: str) -> None:
    """Require that this rank computes on what rank 0 does: NCCL and gloo would wait for each other.

    Raises:
        UserError: one has a GPU, the other has none.
    """
    if ranks.rank == 0:
        store.set("device", f"{device} {node_name()}")
    first, first_node = store.get("device").decode().split(" ", 1)
    if first != device:
        raise UserError(
            f"rank {ranks.rank} on {node_name()} runs on a {device}, rank 0 on {first_node} on a {first}: "
            "on one of them torch sees no usable GPU; look at nvidia-smi there, or exclude it: sbatch --exclude"
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
