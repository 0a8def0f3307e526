"""List the recipes of this package, or print one as a run would read it.

    treg recipe
    treg recipe llama3_8b
    treg recipe llama3_8b optimizer.lr=1e-6
    treg recipe runs/X/train --key train.output

Prints the whole recipe with defaults filled in and overrides applied, and where each value comes from. RECIPE is a name
from the list, the path of a YAML file, or a training checkpoint. The output can be saved, edited and run.
"""

import argparse

from treg_megatron.cli.arguments import command_parser, recipe_at


def parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Arguments of ``treg recipe``."""
    parser = command_parser(prog, __doc__)
    parser.add_argument("words", nargs="*", metavar="[RECIPE] section.key=value", help="recipe, and keys that differ")
    parser.add_argument("--recipe", metavar="RECIPE", help="the recipe, as for the other commands")
    parser.add_argument("--key", metavar="SECTION.KEY", help="print this key alone; one without a value is refused")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Print the list or the recipe."""
    from treg_megatron.config import recipe

    overrides = [word for word in arguments.words if "=" in word]
    named = [arguments.recipe] * (arguments.recipe is not None) + [word for word in arguments.words if "=" not in word]
    if not (arguments.words or named or arguments.key):
        for name, summary in recipe.summaries().items():
            print(f"{name:<18} {summary}")
        return
    if len(named) > 1:
        raise recipe.UserError(f"one recipe at a time: {' and '.join(named)} were named")
    config, sources = recipe.trace_recipe(recipe_at(named[0] if named else "base"), overrides)
    print(recipe.value(config, arguments.key) if arguments.key else recipe.described(config, sources))
