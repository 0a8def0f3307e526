"""The data files of a folder, in natural order."""

import glob
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path

from treg_megatron.containers.splits import missing_shards, patterns_by_split
from treg_megatron.errors import UserError
from treg_megatron.utils.files import natural_order

_KINDS = {
    "JSONL": (".jsonl", ".ndjson"),
    "JSON": (".json",),
    "Parquet": (".parquet", ".pq"),
    "Arrow": (".arrow", ".feather", ".ipc"),
    "CSV": (".csv",),
    "TSV": (".tsv",),
}
_KIND_OF = {suffix: kind for kind, suffixes in _KINDS.items() for suffix in suffixes}
_COMPRESSED = re.compile(r"\.(gz|gzip|zst|zstd|bz2|xz)$", re.IGNORECASE)
_METADATA = re.compile(r"dataset_infos?\.json|manifest\.json")
_SHOWN = 6
_MOST_ENTRIES = 20_000  # of a folder tree that is searched for data
_SEVERAL = "several are given with commas between them"


def folder_files(folder: Path) -> list[Path]:
    """The data files of a folder: shards of one kind, or what ``save_to_disk`` of ``datasets`` wrote.

    Raises:
        UserError: the folder holds several splits, several kinds of files, a part of its shards, or no data.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(
            (path.name for path in folder.iterdir() if path.is_dir()), key=lambda name: (name != "train", name)
        )
        raise UserError(
            f"{folder} holds the splits {', '.join(splits)}: name one of them, such as {folder / splits[0]}"
            if splits
            else f"{folder} names splits that do not exist"
        )
    if (folder / "state.json").is_file():
        return _saved_files(folder)
    try:
        files = [path for path in folder.iterdir() if not path.is_dir()]  # a broken link is an error later
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    by_kind = _by_kind(files)
    if (folder / "tokenizer_config.json").is_file():
        raise UserError(f"{folder} is the folder of a model: give preference pairs")
    if not by_kind:
        raise _no_data(folder)
    if len(by_kind) > 1:
        held = ", ".join(f"{len(paths)} {kind} ({paths[0].name})" for kind, paths in sorted(by_kind.items()))
        suffix = next(iter(by_kind.values()))[0].suffix
        raise UserError(
            f"{folder} holds files of several kinds: {held}; give one kind, such as '{_below(folder, f'*{suffix}')}'"
        )
    (found,) = by_kind.values()
    refuse_several_splits(str(folder), folder, found)
    if missing := missing_shards(path.name for path in found):
        raise UserError(
            f"{folder} lacks {missing[0]}{' and others' if len(missing) > 1 else ''}: download or copy it again; to "
            f"read what is there, give '{_below(folder, '*' + found[0].suffix)}'"
        )
    plain = {path.name for path in found}
    for path in found:
        if (name := _COMPRESSED.sub("", path.name)) != path.name and name in plain:
            raise UserError(f"{folder} holds {name} both as it is and compressed ({path.name}): remove one of them")
    return sorted(found, key=natural_order)


def refuse_several_splits(given: str, folder: Path, files: Iterable[Path]) -> None:
    """Check that the names of ``files``, which lie below ``folder``, do not tell of several splits.

    Raises:
        UserError: they do; the message names the splits, and a pattern for each.
    """
    patterns = patterns_by_split(str(path.relative_to(folder)) for path in files)
    if patterns:
        listed = " or ".join(f"'{_below(folder, pattern)}'" for pattern in patterns.values())
        raise UserError(f"{given} holds several splits ({', '.join(patterns)}): give {listed}; {_SEVERAL}")


def _below(folder: Path, pattern: str) -> str:
    return ",".join(f"{glob.escape(str(folder))}/{part}" for part in pattern.split(","))


def _saved_files(folder: Path) -> list[Path]:
    try:
        names = [file["filename"] for file in json.loads((folder / "state.json").read_bytes())["_data_files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{folder / 'state.json'} is not what save_to_disk writes: {error!r}") from None
    return [folder / name for name in names]


def _by_kind(files: Iterable[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(files):
        kind = _KIND_OF.get(Path(_COMPRESSED.sub("", path.name)).suffix.lower())
        if kind and not path.name.startswith((".", "_")) and not _METADATA.fullmatch(path.name):
            found.setdefault(kind, []).append(path)
    return found


def _no_data(folder: Path) -> UserError:
    below = _sources_below(folder)
    if below:
        listed = ", ".join(f"'{source}'" for source in below[:_SHOWN]) + ", ..." * (len(below) > _SHOWN)
        return UserError(f"{folder} holds its data in folders: give {listed}" + f"; {_SEVERAL}" * (len(below) > 1))
    held = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    listed = ", ".join(held[:_SHOWN]) + ", ..." * (len(held) > _SHOWN)
    return UserError(
        f"{folder} holds neither .parquet files nor a dataset that save_to_disk wrote, nor JSONL, JSON, Arrow or CSV "
        f"files: {f'it holds {listed}' if held else 'it is empty'}"
    )


def _sources_below(folder: Path) -> list[str]:
    """What could be given instead of a folder that holds data further down."""
    by_folder: dict[Path, list[Path]] = {}
    for path in itertools.islice(folder.rglob("*"), _MOST_ENTRIES):
        inside = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") for part in inside):
            by_folder.setdefault(path.parent, []).append(path)
    sources = []
    for parent, files in sorted(by_folder.items()):
        if parent == folder:
            continue
        if any(path.name == "state.json" for path in files):
            sources.append(str(parent))
            continue
        for kind in (kinds := _by_kind(files)).values():
            patterns = patterns_by_split(path.name for path in kind)
            whole = str(parent) if len(kinds) == 1 else _below(parent, f"*{kind[0].suffix}")
            sources += [_below(parent, pattern) for pattern in patterns.values()] or [whole]
    return sources
