"""One YAML recipe describes a whole run; each step reads its own section.

A recipe is a short diff: its ``defaults:`` key names the file that it extends, and the chain ends in
``recipes/base.yaml``, the only home of default values. :mod:`treg_megatron.config.schema` gives every key its type and
help. ``key=value`` arguments override the file, and flags of a command override those. There, the value of a key whose
type is text is taken as it stands; other values, and recipe files, are YAML.
"""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from treg_megatron.config.schema import SECTIONS, SOURCE_KEYS, Recipe
from treg_megatron.errors import UserError

# beside the package in a checkout, inside it where it was installed
_INSTALLED = Path(__file__).resolve().parents[1] / "recipes"
RECIPES = _INSTALLED if _INSTALLED.is_dir() else _INSTALLED.parents[1] / "recipes"
BASE_RECIPE = RECIPES / "base.yaml"
COMMAND_LINE = "the command line"
_TEXT = (str, str | None, list[str], list[str] | None, dict[str, str])
_LIKE_A_NUMBER = re.compile(r"[-+.\d_eE]+")  # OmegaConf reads 1e3 as a number, PyYAML writes the text without quotes

_CACHED = "training holds no reference model: its log-probs are cached by labelling, and simpo reads none"
# keys of other trainers, and what to do here instead
FOREIGN = {
    "reference": _CACHED,
    "reference_model": _CACHED,
    "ref_model": _CACHED,
    "packing": "set data.layout=packed or data.layout=bins",
    "loss_type": "set objective.loss_type",
    "max_length": "set data.seq_length for training, label.max_length for labelling",
    "gradient_accumulation_steps": "set data.global_batch_size; the micro-batches that it takes follow from it",
    "bf16": "set train.precision=bf16",
}


# keys that have a new name, by their old one
RENAMED = {
    "objective.preference": "objective.loss_type",
    "objective.sft_weight": "objective.sft_loss_weight",
    "sample.tries": "sample.max_attempts",
    "train.keep_checkpoints": "train.save_total_limit",
    "train.stuck_after": "train.hang_timeout_s",
}


class RecordedRecipe(NamedTuple):
    """The recipe that a training run wrote into its checkpoint."""

    where: Path
    values: dict[str, Any]


def find_recipe(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that this package ships.

    Raises:
        UserError: neither; the nearest name is suggested.
    """
    path = Path(name).expanduser()
    shipped = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.is_file() or path.parent != Path("."):
        return path
    if shipped.is_file():
        return shipped
    names = list(summaries())
    nearest = difflib.get_close_matches(shipped.stem, names, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"shipped recipes: {', '.join(names)}"
    raise UserError(f"recipe {name} is neither a file nor a shipped recipe; {hint}")


def summaries() -> dict[str, str]:
    """The shipped recipes by name, each with the first sentence of its description."""
    found = {}
    for path in sorted(RECIPES.glob("*.yaml")):
        comments = []
        for line in path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("#"):
                break
            comments.append(line.removeprefix("#").strip())
        description = " ".join(comments[comments.index("") + 1 :] if "" in comments else comments)
        found[path.stem] = re.split(r"(?<=\.) (?=[A-Z])", description)[0]
    return found


def with_current_keys(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier release wrote into a checkpoint, with the keys of :data:`RENAMED` renamed."""
    current = {name: dict(value) if isinstance(value, dict) else value for name, value in recorded.items()}
    for old, new in RENAMED.items():
        section_name, key = old.split(".")
        if key in current.get(section_name, {}):
            current[section_name][new.split(".")[1]] = current[section_name].pop(key)
    return current


def load_recipe(path: str | Path | RecordedRecipe = BASE_RECIPE, overrides: Sequence[str] = ()) -> DictConfig:
    """Read a recipe, its ``defaults`` and ``key=value`` overrides into one checked, typed config.

    Interpolations stay unresolved, and keys left as ``???`` are asked for only when a step reads them.

    Args:
        path: a recipe's file, or the recipe that a checkpoint holds.

    Raises:
        UserError: a file that is missing or no YAML, an unknown key (the nearest known one is named), a wrong type.
    """
    return trace_recipe(path, overrides)[0]


def trace_recipe(path: str | Path | RecordedRecipe, overrides: Sequence[str] = ()) -> tuple[DictConfig, dict[str, str]]:
    """:func:`load_recipe`, and where each value comes from: a file or the command line, by ``section.key``."""
    config = OmegaConf.structured(Recipe)
    sources: dict[str, str] = {}
    for where, values in _with_defaults(path):
        _merge(config, values, _short(where), sources)
    if all(OmegaConf.is_missing(config, name) for name in SECTIONS):
        raise UserError(f"recipe {_short(where)} has no sections; does it lack `defaults: base.yaml`?")
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r} is not of the form section.key=value")
        try:
            parsed = _parse_override(*override.split("=", 1))
        except Exception as error:
            raise UserError(f"override {override!r}: {_first_line(error)}") from None
        _merge(config, parsed, COMMAND_LINE, sources)
    return config, sources


def described(config: DictConfig, sources: dict[str, str]) -> str:
    """The whole recipe as YAML that can be launched as it is, each line with where its value comes from."""
    lines = []
    for name in config:
        if name in SECTIONS and OmegaConf.is_missing(config, name):
            continue
        if name in SECTIONS:
            node = config[name]
            lines += ["", f"{name}:", *(_described(node, k, f"{name}.{k}", sources, "  ") for k in node)]
        else:
            lines.append(_described(config, str(name), str(name), sources, ""))
    return "\n".join(lines)


def section(recipe: DictConfig, name: str) -> Any:
    """One section as its dataclass, interpolations resolved.

    Raises:
        UserError: a key of the section is still ``???``, or a value is not among the key's choices.
    """
    if OmegaConf.is_missing(recipe, name):
        raise UserError(f"recipe {recipe.get('name', '?')} has no section {name}; does it lack `defaults: base.yaml`?")
    node = recipe[name]
    missing = [k for k in node if OmegaConf.is_missing(node, k)]
    if missing:
        raise UserError(
            f"recipe {recipe.get('name', '?')}: {name}.{missing[0]} has no value; "
            f"set it in the recipe or pass {name}.{missing[0]}=VALUE ({_help(name, missing[0])})"
        )
    try:
        values: Any = OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe section {name}: {_first_line(error)}") from None
    return _checked(values, name)


def with_changes(values: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A section's dataclass with some of its values changed, which are checked as those of a recipe.

    Args:
        where: full name of the mapping of changes, for messages.

    Raises:
        UserError: a key is unknown, a value is of the wrong type, or not among the key's choices.
    """
    changed = OmegaConf.structured(type(values))
    try:
        changed.merge_with({k: _escape(v) if isinstance(v, str) else v for k, v in changes.items()})
    except OmegaConfBaseException as error:
        raise UserError(f"{where}.{getattr(error, 'full_key', '')}: {_first_line(error)}") from None
    return _checked(dataclasses.replace(values, **{k: changed[k] for k in changes}), where)


def _checked(values: Any, name: str) -> Any:
    for field in dataclasses.fields(values):
        if str(getattr(values, field.name)).startswith("~/"):  # no shell expands it in YAML or after --flag=
            setattr(values, field.name, str(Path(getattr(values, field.name)).expanduser()))
        choices = field.metadata.get("choices")
        if choices and getattr(values, field.name) not in (*choices, None):
            raise UserError(
                f"{name}.{field.name} is {getattr(values, field.name)!r}; choose one of {', '.join(choices)}"
            )
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


def _parse_override(name: str, value: str) -> DictConfig:
    """One ``key=value`` of the command line, as a recipe that holds this key only."""
    parts = name.split(".")
    holder = SECTIONS.get(parts[0]) if len(parts) > 1 else Recipe
    types = {field.name: field.type for field in dataclasses.fields(holder)} if holder else {}
    kind = types.get(parts[:2][-1])
    if kind == dict[str, str] and len(parts) == 3:
        kind = str  # one entry
    of_values = parts[:2] == ["label", "values"] and len(parts) == 4
    if of_values:
        kind = types.get(parts[3])
    if kind not in _TEXT or (len(parts) > 3 and not of_values):
        return OmegaConf.from_dotlist([f"{name}={value}"])
    parsed: Any = _escape(value)
    if kind in (str | None, list[str] | None) and value in ("null", ""):
        parsed = None
    elif kind in (list[str], list[str] | None):
        parsed = [_escape(item) for item in _items(value)]
    elif kind == dict[str, str]:
        parsed = {key: _escape(text) for key, text in yaml.load(value, yaml.BaseLoader).items()}
    for part in reversed(parts):
        parsed = {part: parsed}
    return OmegaConf.create(parsed)


def _items(value: str) -> list[str]:
    """A list of texts: as JSON, or with commas between them, brackets and quotes being optional."""
    try:
        items = json.loads(value)
    except ValueError:
        items = None
    if isinstance(items, list) and all(isinstance(item, str) for item in items):
        return items
    inside = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    return [item.strip().strip("'\"") for item in inside.split(",") if item.strip()]


def _escape(text: str) -> str:
    """Text that OmegaConf reads as ``text``, without resolving a ``${...}`` in it."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _with_defaults(path: str | Path | RecordedRecipe) -> list[tuple[Path, DictConfig]]:
    """The files that a recipe extends, the base first, and the recipe itself."""
    if isinstance(path, RecordedRecipe):  # written whole
        return [(path.where, OmegaConf.create(path.values))]
    chain: dict[Path, DictConfig] = {}
    source = Path(path)
    while source not in chain:
        chain[source] = values = _read_yaml(source)
        parent = values.pop("defaults", None)
        if parent is None:
            return list(chain.items())[::-1]
        child, source = source, _beside(source, parent)
    raise UserError(f"{child}: defaults: {source.name} extends itself")


def _beside(child: Path, parent: str) -> Path:
    """The recipe that ``child`` extends: a file beside it, or a shipped one, such as ``family/gpu.yaml``."""
    beside = child.parent / parent
    if beside.is_file():
        return beside
    if (RECIPES / parent).is_file():
        return RECIPES / parent
    return beside if Path(parent).parent != Path(".") else find_recipe(parent)


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise UserError(f"recipe {path} does not exist")
    try:
        config = OmegaConf.load(path)
    except Exception as error:
        raise UserError(f"recipe {path} is not valid YAML: {_first_line(error)}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"recipe {path} must be a mapping of sections")
    return config


def _short(path: Path) -> str:
    """Relative to the working directory where the file lies under it."""
    below = Path(os.path.relpath(path))
    return str(path if below.parts[0] == ".." else below)


def _merge(config: DictConfig, extra: DictConfig, source: str, sources: dict[str, str]) -> None:
    for name in map(str, extra):
        _refuse_unknown(name, "", source)
        if name not in SECTIONS:
            sources[name] = source
            continue
        if not isinstance(extra[name], DictConfig):
            raise UserError(f"{source}: {name} must be a mapping of keys")
        for k in extra[name]:
            _refuse_unknown(str(k), name, source)
            sources[f"{name}.{k}"] = source
        if name == "label":
            _refuse_unknown_changes(extra[name].get("values"), source)
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
    if prefix + name in RENAMED:
        raise UserError(f"{source}: {prefix}{name} is now {RENAMED[prefix + name]}")
    elsewhere = [f"{s}.{name}" for s in SECTIONS if name in keys[s]]
    if name in FOREIGN:
        hint = FOREIGN[name]
    elif elsewhere:
        hint = f"did you mean {' or '.join(elsewhere)}?"
    else:
        hint = _nearest(name, known, prefix)
    raise UserError(f"{source}: unknown recipe key {prefix}{name}; {hint}")


def _refuse_unknown_changes(entries: Any, source: str) -> None:
    """Refuse keys of entries of ``label.values`` that no entry may change."""
    for entry, changes in entries.items() if isinstance(entries, DictConfig) else ():
        name = str(entry)
        for k in map(str, changes if isinstance(changes, DictConfig) else ()):
            if k not in SOURCE_KEYS:
                raise UserError(f"{source}: unknown recipe key label.values.{name}.{k}; {_nearest(k, SOURCE_KEYS)}")


def _nearest(name: str, known: Sequence[str], prefix: str = "") -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{nearest[0]}?" if nearest else f"known: {', '.join(known)}"


def _described(node: DictConfig, name: str, full_name: str, sources: dict[str, str], indent: str) -> str:
    unresolved: Any = OmegaConf.to_container(node, resolve=False)
    written = unresolved[name]
    origin = sources.get(full_name, "no value yet")
    try:
        value = OmegaConf.to_container(node[name]) if OmegaConf.is_config(node[name]) else node[name]
        resolved = True
    except OmegaConfBaseException:
        value, resolved = written, False
    if isinstance(written, str) and "${" in written:
        if resolved and isinstance(value, str) and "${" in value:
            value = _escape(value)
        else:
            origin = f"{written} in {origin}"
    quoted = '"' if isinstance(value, str) and _LIKE_A_NUMBER.fullmatch(value) else None
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, default_style=quoted)
    text = text.removesuffix("...\n").strip()
    return f"{indent}{name}: {text}".ljust(48) + f" # {origin}"


def _help(section_name: str, name: str) -> str:
    return next(f.metadata["help"] for f in dataclasses.fields(SECTIONS[section_name]) if f.name == name)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
