"""Check whether a recipe would run on a cluster, on a laptop, before the job is queued.

    treg preflight --recipe llama3_70b
    treg preflight --recipe llama3_70b --nodes 4 --gpus-per-node 8 --gpu-memory 80GB
    treg preflight --recipe llama3_70b --nodes 4 --suggest

Builds the real model of one rank per pipeline stage on meta tensors, in a fake process group of the whole job, and
runs a micro-batch through it. Prints what each rank would hold, what a step would cost and communicate, and a verdict.
The recipe's section `cluster` says where it is meant to run; flags and overrides change it. docs/PREFLIGHT.md explains
every line and how it compares with measurements.

Exit code 0: it fits. 1: it does not; the change that would make it fit is named. 2: the recipe cannot run anywhere.
"""

import argparse
import sys
from pathlib import Path

from treg_megatron.cli.arguments import add_recipe_arguments, command_parser, parse_recipe
from treg_megatron.errors import UserError
from treg_megatron.utils.imports import heavy_imports

EXIT_DOES_NOT_FIT = 1


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg preflight``."""
    parser = command_parser(prog, __doc__)
    add_recipe_arguments(parser)
    parser.add_argument("--nodes", type=int, help="machines (cluster.nodes)")
    parser.add_argument("--gpus-per-node", type=int, help="GPUs of a machine (cluster.gpus_per_node)")
    parser.add_argument("--gpu-memory", type=_gigabytes, metavar="80GB", help="memory of a GPU (cluster.gpu_memory)")
    parser.add_argument("--suggest", action="store_true", help="search the cluster's layouts, print those that fit")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="write the memory of each pipeline stage as a picture")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print the report, and exit with its code."""
    flags = [
        f"cluster.{name}={value}"
        for name in ("nodes", "gpus_per_node", "gpu_memory")
        if (value := getattr(arguments, name)) is not None
    ]
    config = parse_recipe(arguments, flags)
    use_meta_machine()
    sys.exit(preflight(config, arguments.suggest, arguments.plot))


def use_meta_machine() -> None:
    """Prepare this process: no GPU is touched, and the heavy imports happen once."""
    import torch

    if torch.cuda.is_available():
        raise UserError(
            "preflight runs without a GPU: hide it, CUDA_VISIBLE_DEVICES= python -m treg_megatron.preflight"
        )
    from treg_megatron.distributed.cpu_redirect import use_cpu

    use_cpu()
    with heavy_imports():
        import treg_megatron.preflight.suggest  # noqa: F401


def preflight(config, suggest: bool = False, picture: Path | None = None) -> int:
    """Print the report on a recipe; the exit code."""
    from treg_megatron.preflight.named_files import check_files
    from treg_megatron.preflight.plan import make_plan, sections_of
    from treg_megatron.preflight.plot import plot
    from treg_megatron.preflight.report import layout, report, verdict
    from treg_megatron.preflight.suggest import remedy, suggestions

    sections = sections_of(config)
    files, pairs = check_files(sections)
    plan = make_plan(sections)
    print(f"recipe {config.name}\n{report(plan, pairs)}")
    for line in files:
        print(f"file: {line}")
    if picture is not None:
        plot(plan, config.name, picture)
        print(f"picture: {picture}")
    if suggest:
        print("layouts that fit, the fastest first:")
        for found in suggestions(sections):
            print(
                f"  {found.step_seconds:8.3g} s per step, {found.stages[found.fullest].total / 1e9:5.1f} GB: "
                f"{layout(found.sections, found.data_ranks)}"
            )
    print(verdict(plan))
    if plan.fits:
        return 0
    print(remedy(plan))
    return EXIT_DOES_NOT_FIT


def _gigabytes(text: str) -> float:
    return float(text.removesuffix("GB"))
