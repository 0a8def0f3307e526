"""Streaming reader of the records of data of any size, and the data's identity.

    JSON, JSONL, CSV    plain, or compressed by gzip, zstd, bz2 or xz; detected by magic bytes (CSV and TSV by name)
    Parquet, Arrow      one file
    a folder            shards of one of these kinds, or what ``save_to_disk`` of ``datasets`` wrote
    a pattern, a list   ``data/part-*.jsonl``; ``a.jsonl,b.jsonl``
    hub:NAME            a dataset on the Hugging Face hub: ``hub:OWNER/NAME:CONFIG@REVISION:SPLIT``

Only the last needs the ``datasets`` package and network access.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treg_megatron.containers.files import file_rows
from treg_megatron.containers.hub import hub_rows, load_from_hub
from treg_megatron.containers.magic import PARQUET, head_of
from treg_megatron.containers.sources import HUB, is_pattern, local_files, refuse_repeated, split_list
from treg_megatron.errors import UserError
from treg_megatron.utils.files import sha256_of, sha256_of_json

__all__ = ["HUB", "is_parquet", "read_rows", "source_identity"]


def read_rows(source: str | Path) -> Iterator[tuple[int, Any]]:
    """Numbered records of a source, in order.

    Numbers start at 1. In JSONL they are line numbers; of several files they count over all of them.

    Raises:
        UserError: the source is missing, of an unsupported kind, or damaged; the message names file and row.
    """
    parts: list[str | Path] = []
    for item in split_list(source):
        parts += [item] if item.startswith(HUB) else local_files(item)
    refuse_repeated(source, [part for part in parts if isinstance(part, Path)])
    if len(parts) == 1:
        return _rows(parts[0], 0)
    return _rows_of_all(parts)


def is_parquet(path: Path) -> bool:
    """Whether a file begins with the magic bytes of Parquet."""
    return head_of(path).startswith(PARQUET)


def source_identity(source: str | Path) -> dict[str, str]:
    """Identity of an input: name and hash of its files, or name and fingerprint of a hub dataset.

    Raises:
        UserError: as :func:`read_rows`.
    """
    items = split_list(source)
    if len(items) > 1:
        identities = [source_identity(item) for item in items]
        return {
            "file": ",".join(identity["file"] for identity in identities),
            "sha256": sha256_of_json([identity["sha256"] for identity in identities]),
        }
    if str(source).startswith(HUB):
        return {"file": str(source), "sha256": load_from_hub(str(source))._fingerprint}
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            files = {str(file.relative_to(path)): sha256_of(file) for file in sorted(path.rglob("*")) if file.is_file()}
            return {"file": path.name, "sha256": sha256_of_json(files)}
        if is_pattern(str(source)):
            hashes = [[file.name, sha256_of(file)] for file in local_files(str(source))]
            return {"file": path.name, "sha256": sha256_of_json(hashes)}
        return {"file": path.name, "sha256": sha256_of(path)}
    except OSError as error:
        raise UserError(f"pairs file {error.filename or path} cannot be read: {error.strerror}") from None


def _rows(part: str | Path, before: int) -> Iterator[tuple[int, Any]]:
    return file_rows(part, before) if isinstance(part, Path) else hub_rows(part, before)


def _rows_of_all(parts: list[str | Path]) -> Iterator[tuple[int, Any]]:
    number = 0
    for part in parts:
        for number, row in _rows(part, number):  # noqa: B020
            yield number, row
