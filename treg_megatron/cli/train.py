"""Align a model with labelled preference pairs: DPO or SimPO with token-level reward regularization.

    treg train --recipe llama3_8b                                  all GPUs of this machine
    treg train --recipe tiny model.hf=TINY parallel.tensor=2 --nproc 4
    srun --ntasks-per-node 8 treg train --recipe llama3_70b        one process per rank, as slurm/treg_70b.sh does

Starts torchrun on this machine unless torchrun or srun started this process. The same command resumes an interrupted
run from its newest complete checkpoint. Next: treg export.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from treg_megatron.cli.arguments import add_recipe_arguments, command_parser, parse_recipe
from treg_megatron.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg train``."""
    parser = command_parser(prog, __doc__)
    add_recipe_arguments(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="processes to start here (default: as many as fit)")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Replace this process by one rank of the training, or by torchrun."""
    recipe = parse_recipe(arguments)
    from treg_megatron.distributed.launch import was_launched

    training = ["-m", "treg_megatron.train", "--recipe", arguments.recipe, *arguments.overrides]
    if was_launched():
        if arguments.nproc is not None:
            raise UserError(f"--nproc {arguments.nproc}: this process was started by torchrun or srun; leave it out")
        os.execv(sys.executable, [sys.executable, *training])
    if arguments.nproc is not None and arguments.nproc < 1:
        raise UserError(f"--nproc {arguments.nproc} must be at least 1")
    processes = arguments.nproc or _as_many_as_fit(recipe)
    print(f"torchrun: {processes} process{'es' if processes > 1 else ''} on this machine", flush=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    os.execv(sys.executable, [sys.executable, *torchrun, *training])


def _as_many_as_fit(recipe: "DictConfig") -> int:
    from treg_megatron.config.recipe import section

    parallel, cluster = section(recipe, "parallel"), section(recipe, "cluster")
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    return processes_here(model_ranks, visible_gpus(), cluster.gpus_per_node if cluster.device == "cpu" else 1)


def processes_here(model_ranks: int, gpus: int, on_cpu: int) -> int:
    """How many processes to start on this machine.

    Args:
        model_ranks: ranks of one copy of the model.
        gpus: GPUs that torch sees; 0 for a run on the CPU.
        on_cpu: processes that a run on the CPU is meant for.

    Raises:
        UserError: one copy of the model needs more GPUs than there are.
    """
    if gpus and gpus < model_ranks:
        raise UserError(
            f"one copy of the model needs parallel.tensor x parallel.pipeline x parallel.context = {model_ranks} GPUs, "
            f"this machine has {gpus}: run it on more nodes with srun (slurm/), or lower one of the three"
        )
    return max((gpus or on_cpu) // model_ranks, 1) * model_ranks


def visible_gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count()
