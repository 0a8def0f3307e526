"""Check the nodes of a job before it starts, and name the one that would spoil it.

    srun --ntasks-per-node 8 treg check-nodes --recipe llama3_70b

Run it with the ranks of the run. It checks that every node has the same packages, sees the same input files and the
folder that the run writes to, and has room there for the checkpoints; that every device computes; and how fast all
ranks reduce a tensor together. Exit code 0: all well. 2: one line says which node is at fault, and why.
"""

import argparse

from treg_megatron.cli.arguments import add_recipe_arguments, command_parser, parse_recipe


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg check-nodes``."""
    parser = command_parser(prog, __doc__)
    add_recipe_arguments(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Check as this process' rank of the job."""
    recipe = parse_recipe(arguments)
    from treg_megatron.preflight.nodes import check

    check(recipe)
