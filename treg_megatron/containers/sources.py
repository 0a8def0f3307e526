"""What a source names: one file, the files of a folder, those that a pattern matches, or a list of these.

PATH                a file or folder; an existing path is never read as a pattern or list
data/part-*.jsonl   a pattern, as of a shell; ``**`` stands for folders of any depth
A,B                 a list, read one after the other
hub:OWNER/NAME      a dataset on the Hugging Face hub (:mod:`treg_megatron.containers.hub`)
"""

import glob
import os
from pathlib import Path

from treg_megatron.containers.folders import folder_files, refuse_several_splits
from treg_megatron.errors import UserError
from treg_megatron.utils.files import natural_order

HUB = "hub:"
_SEPARATOR = ","


def split_list(source: str | Path) -> list[str]:
    """The sources that ``source`` lists: itself, unless it is no path and has commas.

    Raises:
        UserError: an item of the list is empty or does not exist.
    """
    text = str(source)
    if not text.strip():
        raise UserError("no pairs are named: the source is empty")
    if _SEPARATOR not in text or _exists(text):
        return [text]
    items = [item.strip() for item in text.split(_SEPARATOR)]
    for item in items:
        if not item.startswith(HUB) and not _exists(item) and not glob.has_magic(item):
            missing = f"{item} does not exist" if item else "one is empty"
            raise UserError(f"{text} does not exist, and is read as a list of {len(items)} sources, of which {missing}")
    return items


def is_pattern(source: str) -> bool:
    """Whether a source is a pattern: it has ``*``, ``?`` or ``[``, and no such path exists."""
    return glob.has_magic(source) and not _exists(source)


def local_files(source: str) -> list[Path]:
    """The files of a source that is neither a list nor a hub dataset.

    Raises:
        UserError: nothing matches, or the names tell of several splits; for folders, as
            :func:`~treg_megatron.containers.folders.folder_files`.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return folder_files(path)
    if not is_pattern(source):
        return [path]
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    files = [match for match in matches if match.is_file()]
    folders = [match for match in matches if match.is_dir()] if not files else []
    if not matches:
        raise UserError(f"{source} is a pattern that no file matches")
    if files:
        common = Path(os.path.commonpath([file.parent for file in files]))
        refuse_several_splits(source, common, files)
        return sorted(files, key=lambda file: [natural_order(Path(part)) for part in file.parts])
    common = Path(os.path.commonpath([folder.parent for folder in folders]))
    refuse_several_splits(source, common, folders)
    ordered = sorted(folders, key=lambda folder: [natural_order(Path(part)) for part in folder.parts])
    return [file for folder in ordered for file in folder_files(folder)]


def refuse_repeated(source: str | Path, files: list[Path]) -> None:
    """Check that no file comes twice.

    Raises:
        UserError: one does.
    """
    seen: set[str] = set()
    for file in files:
        if (real := os.path.realpath(file)) in seen:
            raise UserError(f"{source} names {file} more than once")
        seen.add(real)


def _exists(source: str) -> bool:
    return os.path.exists(os.path.expanduser(source))
