"""List the recipes as a table: size, GPUs, memory, batch, pipeline bubble, hours, source of the hyper-parameters.

    treg recipes

The numbers are preflight's, stored when the recipes were made. `treg recipe NAME` prints one recipe, `treg preflight
--recipe NAME` computes its numbers again, for your cluster, and `treg recipe new` makes a recipe for another model.
"""

import argparse

from treg_megatron.cli.arguments import command_parser


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg recipes``."""
    parser = command_parser(prog, __doc__)
    parser.add_argument("--update", action="store_true", help="make the stored numbers again, in a checkout: minutes")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print the table."""
    from treg_megatron.config import recipe_table

    if arguments.update:
        from treg_megatron.cli.preflight import use_meta_machine

        use_meta_machine()
        from treg_megatron.preflight import table

        table.write([table.row(name) for name in table.names()])
    print(recipe_table.as_text(recipe_table.read()))
