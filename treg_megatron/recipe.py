"""One YAML recipe describes a whole run; each station reads its own section.

A recipe is a short diff: its ``defaults:`` key names the file that it extends, and the chain ends in
``recipes/base.yaml``, the only place where a default value stands. :mod:`treg_megatron.sections` gives every key its
type and help. ``key=value`` arguments override the file, flags of a tool override those.
"""

import argparse
import dataclasses
import difflib
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from treg_megatron.errors import UserError
from treg_megatron.sections import SECTIONS, Recipe

BASE_RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "base.yaml"
COMMAND_LINE = "the command line"

_CACHED = "training holds no reference model: its log-probs are cached by labelling, and simpo reads none"
# keys of other trainers, and what to do here instead
FOREIGN = {
    "reference": _CACHED,
    "reference_model": _CACHED,
    "ref_model": _CACHED,
    "packing": "set data.layout=packed or data.layout=bins",
    "loss_type": "set objective.preference",
    "max_length": "set data.seq_length for training, label.max_length for labelling",
    "gradient_accumulation_steps": "set data.global_batch_size; the micro-batches that it takes follow from it",
    "bf16": "set train.precision=bf16",
}


def load_recipe(path: str | Path = BASE_RECIPE, overrides: list[str] = ()) -> DictConfig:
    """Read a recipe, its ``defaults`` and ``key=value`` overrides into one checked, typed config.

    Interpolations stay unresolved, and keys left as ``???`` are asked for only when a station reads them.

    Args:
        path: a recipe, or a training checkpoint for the recipe of its run.

    Raises:
        UserError: a file that is missing or no YAML, an unknown key (the nearest known one is named), a wrong type.
    """
    return trace_recipe(path, overrides)[0]


def trace_recipe(path: str | Path, overrides: list[str] = ()) -> tuple[DictConfig, dict[str, str]]:
    """:func:`load_recipe`, and where each value comes from: a file or the command line, by ``section.key``."""
    config = OmegaConf.structured(Recipe)
    OmegaConf.set_struct(config, True)
    sources: dict[str, str] = {}
    for source in _with_defaults(Path(path)):
        _merge(config, _read_yaml(source), _short(source), sources)
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r} is not of the form section.key=value")
        name, value = override.split("=", 1)
        try:
            parsed = OmegaConf.from_dotlist([f"{name}={value}"])
        except Exception as error:
            raise UserError(f"override {override!r}: {error}") from None
        _merge(config, parsed, COMMAND_LINE, sources)
    return config, sources


def described(config: DictConfig, sources: dict[str, str]) -> str:
    """The whole recipe as YAML that can be launched as it is, each line with where its value comes from."""
    lines = []
    for name in config:
        if name in SECTIONS:
            node = config[name]
            lines += ["", f"{name}:", *(_described(node, k, f"{name}.{k}", sources, "  ") for k in node)]
        else:
            lines.append(_described(config, name, name, sources, ""))
    return "\n".join(lines)


def section(recipe: DictConfig, name: str) -> Any:
    """One section as its dataclass, interpolations resolved.

    Raises:
        UserError: a key of the section is still ``???``, or a value is not among the key's choices.
    """
    node = recipe[name]
    missing = [k for k in node if OmegaConf.is_missing(node, k)]
    if missing:
        raise UserError(f"recipe {recipe.get('name', '?')}: {name}.{missing[0]} has no value; "
                        f"set it in the recipe or pass {name}.{missing[0]}=VALUE ({_help(name, missing[0])})")
    try:
        values = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe section {name}: {_first_line(error)}") from None
    for field in dataclasses.fields(values):
        choices = field.metadata.get("choices")
        if choices and getattr(values, field.name) not in choices:
            raise UserError(f"{name}.{field.name} is {getattr(values, field.name)!r}; choose one of {', '.join(choices)}")
    return values


def value(recipe: DictConfig, name: str) -> Any:
    """The value of one key, ``section.key``, resolved.

    Raises:
        UserError: there is no such key, or it has no value.
    """
    try:
        found = OmegaConf.select(recipe, name, throw_on_missing=True, throw_on_resolution_failure=True)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe {recipe.get('name', '?')}: {name}: {_first_line(error)}") from None
    if found is None:
        raise UserError(f"recipe {recipe.get('name', '?')}: {name} has no value")
    return found


def station_section(name: str, description: str, argv: list[str] | None = None,
                    prog: str | None = None) -> Any:
    """Parse a station's command line: ``--recipe``, a flag for every key of its section, and ``key=value`` overrides."""
    parser = argparse.ArgumentParser(prog=prog, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_section_arguments(parser, name)
    return parse_section(parser.parse_args(argv), name)


def add_section_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Give ``parser`` :func:`add_recipe_arguments`, and one flag for each key of a section."""
    add_recipe_arguments(parser, help=f"recipe whose section `{name}` gives what no flag does "
                                      "(default: recipes/base.yaml)", default=str(BASE_RECIPE))
    group = parser.add_argument_group(f"keys of the recipe's section `{name}`")
    for field in dataclasses.fields(SECTIONS[name]):
        choices = field.metadata["choices"]
        group.add_argument("--" + field.name.replace("_", "-"), dest=f"{name}.{field.name}",
                           metavar="|".join(choices) if choices else field.name.upper(), help=field.metadata["help"])


def parse_section(arguments: argparse.Namespace, name: str) -> Any:
    """The section that :func:`add_section_arguments` described, with every flag and override applied."""
    flags = [f"{k}={v}" for k, v in vars(arguments).items() if k.startswith(name + ".") and v is not None]
    return section(parse_recipe(arguments, flags), name)


def add_recipe_arguments(parser: argparse.ArgumentParser, help: str = "the run's recipe, or a checkpoint of the run",
                         default: str | None = None) -> None:
    """Give ``parser`` the options that every entry point has: ``--recipe``, ``--print`` and ``key=value`` overrides."""
    parser.add_argument("--recipe", default=default, required=default is None, metavar="YAML", help=help)
    parser.add_argument("--print", action="store_true", dest="print_recipe",
                        help="print the recipe with every override applied, where each value comes from, and stop")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="keys that differ from the recipe")


def parse_recipe(arguments: argparse.Namespace, flags: list[str] = ()) -> DictConfig:
    """The recipe that :func:`add_recipe_arguments` described; under ``--print`` it is printed and the program ends."""
    config, sources = trace_recipe(arguments.recipe, [*arguments.overrides, *flags])
    if arguments.print_recipe:
        print(described(config, sources))
        sys.exit(0)
    return config


def _with_defaults(path: Path) -> list[Path]:
    chain = [path]
    while (parent := _read_yaml(chain[0], keep_defaults=True).get("defaults")) is not None:
        parent = chain[0].parent / parent
        if parent in chain:
            raise UserError(f"{chain[0]}: defaults: {parent.name} extends itself")
        chain.insert(0, parent)
    return chain


def _read_yaml(path: Path, keep_defaults: bool = False) -> DictConfig:
    if path.is_dir():
        return OmegaConf.create(_recipe_of_checkpoint(path))
    if not path.is_file():
        raise UserError(f"recipe {path} does not exist")
    try:
        config = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"recipe {path} is not valid YAML: {_first_line(error)}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"recipe {path} must be a mapping of sections")
    if not keep_defaults:
        config.pop("defaults", None)
    return config


def _short(path: Path) -> str:
    """Relative to the working directory where the file lies under it."""
    below = Path(os.path.relpath(path))
    return str(path if below.parts[0] == ".." else below)


def _recipe_of_checkpoint(folder: Path) -> dict:
    from treg_megatron.checkpoint.layout import find_checkpoint, read_identity

    checkpoint = find_checkpoint(folder)
    found = read_identity(checkpoint).run.get("recipe")
    if found is None:
        raise UserError(f"checkpoint {checkpoint} holds no recipe: training did not write it; name the recipe's file")
    return found


def _merge(config: DictConfig, extra: DictConfig, source: str, sources: dict[str, str]) -> None:
    for name in extra:
        _refuse_unknown(str(name), "", source)
        if name not in SECTIONS:
            sources[name] = source
            continue
        if not isinstance(extra[name], DictConfig):
            raise UserError(f"{source}: {name} must be a mapping of keys")
        for k in extra[name]:
            _refuse_unknown(str(k), name, source)
            sources[f"{name}.{k}"] = source
    try:
        config.merge_with(extra)
    except OmegaConfBaseException as error:
        raise UserError(f"{source}: {getattr(error, 'full_key', '')}: {_first_line(error)}") from None


def _refuse_unknown(name: str, section_name: str, source: str) -> None:
    keys = {s: [f.name for f in dataclasses.fields(SECTIONS[s])] for s in SECTIONS}
    known = keys[section_name] if section_name else [f.name for f in dataclasses.fields(Recipe)]
    if name in known:
        return
    prefix = f"{section_name}." if section_name else ""
    elsewhere = [f"{s}.{name}" for s in SECTIONS if name in keys[s]]
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if name in FOREIGN:
        hint = FOREIGN[name]
    elif elsewhere:
        hint = f"did you mean {' or '.join(elsewhere)}?"
    elif nearest:
        hint = f"did you mean {prefix}{nearest[0]}?"
    else:
        hint = f"known: {', '.join(known)}"
    raise UserError(f"{source}: unknown recipe key {prefix}{name}; {hint}")


def _described(node: DictConfig, name: str, full_name: str, sources: dict[str, str], indent: str) -> str:
    written = OmegaConf.to_container(node, resolve=False)[name]
    origin = sources.get(full_name, "no value yet")
    try:
        value = OmegaConf.to_container(node[name]) if OmegaConf.is_config(node[name]) else node[name]
    except OmegaConfBaseException:
        value = written
    if isinstance(written, str) and "${" in written:
        origin = f"{written} in {origin}"
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"{indent}{name}: {text}".ljust(48) + f" # {origin}"


def _help(section_name: str, name: str) -> str:
    return next(f.metadata["help"] for f in dataclasses.fields(SECTIONS[section_name]) if f.name == name)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
