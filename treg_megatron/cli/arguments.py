"""The command line of every step: ``--recipe``, ``--print``, flags for the keys of a section, ``key=value`` overrides."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from treg_megatron.checkpoint.layout import find_checkpoint, read_identity
from treg_megatron.config.recipe import BASE_RECIPE, RecordedRecipe, described, section, trace_recipe
from treg_megatron.config.schema import SECTIONS
from treg_megatron.errors import UserError


def station_section(name: str, description: str, argv: list[str] | None = None, prog: str | None = None) -> Any:
    """Parse a station's command line: ``--recipe``, a flag for every key of its section, and ``key=value`` overrides."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_section_arguments(parser, name)
    return parse_section(parser.parse_args(argv), name)


def add_section_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Give ``parser`` :func:`add_recipe_arguments`, and one flag for each key of a section."""
    add_recipe_arguments(
        parser,
        help=f"recipe whose section `{name}` gives what no flag does (default: recipes/base.yaml)",
        default=str(BASE_RECIPE),
    )
    group = parser.add_argument_group(f"keys of the recipe's section `{name}`")
    for field in dataclasses.fields(SECTIONS[name]):
        choices = field.metadata["choices"]
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=f"{name}.{field.name}",
            metavar="|".join(choices) if choices else field.name.upper(),
            help=field.metadata["help"],
        )


def parse_section(arguments: argparse.Namespace, name: str) -> Any:
    """The section that :func:`add_section_arguments` described, with every flag and override applied."""
    flags = [f"{k}={v}" for k, v in vars(arguments).items() if k.startswith(name + ".") and v is not None]
    return section(parse_recipe(arguments, flags), name)


def add_recipe_arguments(
    parser: argparse.ArgumentParser,
    help: str = "the run's recipe, or a checkpoint of the run",
    default: str | None = None,
) -> None:
    """Give ``parser`` the options that every entry point has: ``--recipe``, ``--print`` and ``key=value`` overrides."""
    parser.add_argument("--recipe", default=default, required=default is None, metavar="YAML", help=help)
    parser.add_argument(
        "--print",
        action="store_true",
        dest="print_recipe",
        help="print the recipe with every override applied, where each value comes from, and stop",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that differ from the recipe")


def parse_recipe(arguments: argparse.Namespace, flags: list[str] = ()) -> DictConfig:
    """The recipe that :func:`add_recipe_arguments` described; under ``--print`` it is printed and the program ends."""
    config, sources = trace_recipe(recipe_at(arguments.recipe), [*arguments.overrides, *flags])
    if arguments.print_recipe:
        print(described(config, sources))
        sys.exit(0)
    return config


def recipe_at(path: str | Path) -> Path | RecordedRecipe:
    """What ``--recipe`` names: a recipe's file, or of a training checkpoint the recipe of its run.

    Raises:
        UserError: a folder that is no checkpoint, or one whose checkpoint holds no recipe.
    """
    if not Path(path).is_dir():
        return Path(path)
    checkpoint = find_checkpoint(Path(path))
    recorded = read_identity(checkpoint).run.get("recipe")
    if recorded is None:
        raise UserError(f"checkpoint {checkpoint} holds no recipe: training did not write it; name the recipe's file")
    return RecordedRecipe(Path(path), recorded)
