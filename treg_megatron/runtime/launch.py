"""One process per rank, started by torchrun or by srun: who am I, and how many are we."""

import os
from dataclasses import dataclass

from treg_megatron.errors import UserError


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


def world() -> World:
    """Read the launcher's environment.

    Raises:
        UserError: nodes with different numbers of processes.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or "LOCAL_WORLD_SIZE" in os.environ:  # torchrun
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        found = World(*(int(os.environ[name]) for name in names))
    elif "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1:  # srun
        size, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
        found = World(int(os.environ["SLURM_PROCID"]), size, int(os.environ["SLURM_LOCALID"]), size // nodes)
    else:
        found = World(0, 1, 0, 1)
    if found.size % found.local_size:
        raise UserError(f"{found.size} processes do not divide into nodes of {found.local_size}: "
                        f"start the same number on every node")
    return found


def rank_zero_print(*values: object) -> None:
    """Print on rank 0 of the job only."""
    if world().rank == 0:
        print(*values, flush=True)

