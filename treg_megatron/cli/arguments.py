"""Arguments that commands share: ``--recipe``, ``--print``, a flag per key of a section, ``key=value`` overrides."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treg_megatron.config.schema import SECTIONS
from treg_megatron.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from treg_megatron.config.recipe import RecordedRecipe

# flags that take several words
_METAVARS: dict[Any, str] = {dict[str, str]: "FIELD=COLUMN", list[str]: "TEXT", list[str] | None: "TEXT"}


def command_parser(prog: str | None, description: str | None) -> argparse.ArgumentParser:
    """A parser that prints ``description`` as it is written, and knows ``--verbose``."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # read by utils.entry, before anything is imported that logs
    parser.add_argument("--verbose", action="store_true", help="show every log line and warning of the libraries, too")
    return parser


def section_parser(prog: str | None, description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with :func:`add_recipe_arguments` and one flag for each key of the recipe's section ``name``."""
    parser = command_parser(prog, description)
    add_recipe_arguments(
        parser,
        help=f"recipe, by name or path, whose section `{name}` gives what no flag does (default: base)",
        default="base",
    )
    group = parser.add_argument_group(f"keys of the recipe's section `{name}`")
    for field in dataclasses.fields(SECTIONS[name]):
        choices = field.metadata["choices"]
        group.add_argument(
            "--" + field.name.replace("_", "-"),
            dest=f"{name}.{field.name}",
            metavar="|".join(choices) if choices else _METAVARS.get(field.type, field.name.upper()),
            nargs="+" if field.type in _METAVARS else None,
            help=field.metadata["help"].replace("%", "%%"),
        )
    return parser


def parse_section(arguments: argparse.Namespace, name: str) -> Any:
    """The section that :func:`section_parser` described, with every flag and override applied."""
    from treg_megatron.config.recipe import section

    flags = [
        f"{k}={v if isinstance(v, str) else json.dumps(_collected(k, v), ensure_ascii=False)}"
        for k, v in vars(arguments).items()
        if k.startswith(name + ".") and v is not None
    ]
    return section(parse_recipe(arguments, flags), name)


def _collected(name: str, words: Sequence[str]) -> list[str] | dict[str, str]:
    """Words of a flag that takes several: ``field=column`` words as a mapping, others as a list."""
    return columns_of(words) if name.endswith(".columns") else list(words)


def columns_of(words: Sequence[str]) -> dict[str, str]:
    """``field=column`` words as a mapping.

    Raises:
        UserError: a word is of another form.
    """
    pairs = [word.partition("=") for word in words]
    if wrong := [word for word, (field, _, column) in zip(words, pairs, strict=True) if not field or not column]:
        raise UserError(f"--columns {wrong[0]}: write field=column, such as prompt=question")
    return {field: column for field, _, column in pairs}


def add_recipe_arguments(
    parser: argparse.ArgumentParser,
    help: str = "the run's recipe, by name or path, or a checkpoint of the run",
    default: str | None = None,
) -> None:
    """Add ``--recipe``, ``--print`` and ``key=value`` overrides."""
    parser.add_argument("--recipe", default=default, required=default is None, metavar="RECIPE", help=help)
    parser.add_argument(
        "--print",
        action="store_true",
        dest="print_recipe",
        help="print the recipe with every override applied, where each value comes from, and stop",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that differ from the recipe")


def parse_recipe(arguments: argparse.Namespace, flags: Sequence[str] = ()) -> "DictConfig":
    """The recipe that :func:`add_recipe_arguments` described; under ``--print`` it is printed and the program ends."""
    from treg_megatron.config.recipe import described, trace_recipe

    config, sources = trace_recipe(recipe_at(arguments.recipe), [*arguments.overrides, *flags])
    if arguments.print_recipe:
        print(described(config, sources))
        sys.exit(0)
    return config


def recipe_at(name: str | Path) -> "Path | RecordedRecipe":
    """What ``--recipe`` names: a recipe's file, a recipe of this package, or a checkpoint for the recipe of its run.

    Raises:
        UserError: no such recipe, a folder that is not a checkpoint, or a checkpoint without a recipe.
    """
    from treg_megatron.checkpoint.layout import find_checkpoint, is_checkpoint, read_metadata
    from treg_megatron.config.recipe import RecordedRecipe, find_recipe, summaries

    name = Path(name).expanduser()
    # a folder that only happens to be called like a shipped recipe does not hide it
    if not name.is_dir() or (str(name) in summaries() and not is_checkpoint(name)):
        return find_recipe(name)
    checkpoint = find_checkpoint(name)
    recorded = read_metadata(checkpoint).run.get("recipe")
    if recorded is None:
        raise UserError(f"checkpoint {checkpoint} has no recipe: training did not write it; name the recipe's file")
    return RecordedRecipe(name, recorded)
