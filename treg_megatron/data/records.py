"""Streaming reader of the records of data of any size, and the data's identity.

    JSON, JSONL, CSV    plain, or compressed by gzip, zstd, bz2 or xz; detected by magic bytes (CSV and TSV by name)
    Parquet, Arrow      one file
    a folder            shards of one of these kinds, or what ``save_to_disk`` of ``datasets`` wrote
    a pattern, a list   ``data/part-*.jsonl``; ``a.jsonl,b.jsonl``
    hub:NAME            a dataset on the Hugging Face hub: ``hub:OWNER/NAME:CONFIG@REVISION:SPLIT``

Only the last needs the ``datasets`` package and network access.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from treg_megatron.containers.files import file_portions, file_rows, portion_rows, rows_from
from treg_megatron.containers.hub import hub_rows, load_from_hub
from treg_megatron.containers.json_portions import Portion
from treg_megatron.containers.magic import PARQUET, head_of
from treg_megatron.containers.sources import HUB, is_pattern, local_files, refuse_repeated, split_list
from treg_megatron.errors import UserError
from treg_megatron.utils.files import sha256_of, sha256_of_json
from treg_megatron.utils.parallel import batches, in_order

__all__ = ["HUB", "is_parquet", "read_rows", "source_identity", "work_on_rows"]

Row = tuple[int, Any]
Result = TypeVar("Result")

_ROWS_AT_ONCE = 64
_ALONE = 8  # batches of a file before other processes are started


def read_rows(source: str | Path) -> Iterator[tuple[int, Any]]:
    """Numbered records of a source, in order.

    Numbers start at 1. In JSONL they are line numbers; of several files they count over all of them.

    Raises:
        UserError: the source is missing, of an unsupported kind, or damaged; the message names file and row.
    """
    parts = _parts_of(source)
    if len(parts) == 1:
        return _rows(parts[0], 0)
    return _rows_of_all(parts)


def work_on_rows(
    work: Callable[[Sequence[Row]], Result], source: str | Path, workers: int, alone: Callable[[], bool]
) -> Iterator[tuple[int, Result]]:
    """``work`` of the records of a source, batch by batch, in order, shared among processes.

    The records, their numbers and what is refused are those of :func:`read_rows`.

    Args:
        work: gets a batch of numbered records; what it returns must be small, because it is copied between processes.
        workers: number of processes.
        alone: whether this process still works alone, because ``work`` changes itself with what comes first.

    Yields:
        the number to add to the numbers of the batch, and the result.

    Raises:
        UserError: as :func:`read_rows`.
    """
    last = 0
    for part in _parts_of(source):
        portions = file_portions(part) if isinstance(part, Path) else None
        if portions is None:
            rows = batches(_rows(part, last), _ROWS_AT_ONCE)
            for number, result in _shared(partial(_of_batch, work), rows, workers, alone):
                yield 0, result
                last = number
            continue
        before, local = last, 0
        for done in _shared(partial(_of_portion, work), portions, workers, alone):
            if done.to_read_on:
                for batch in batches(rows_from(done.to_read_on, before, local, last), _ROWS_AT_ONCE):
                    yield 0, work(batch)
                    last = batch[-1][0]
                break
            if done.last:
                yield before + local, done.result
                last = before + local + done.last
            local += done.numbers


class _Done(NamedTuple):
    """What became of a portion: the number of its last row, how many it takes, and the result; or where to read on."""

    last: int = 0
    numbers: int = 0
    result: Any = None
    to_read_on: Portion | None = None


def _of_portion(work: Callable[[Sequence[Row]], Any], portion: Portion) -> _Done:
    found = portion_rows(portion)
    if found is None:
        return _Done(to_read_on=portion._replace(data=None))
    if not found.rows:
        return _Done(numbers=found.numbers)
    return _Done(found.rows[-1][0], found.numbers, work(found.rows))


def _of_batch(work: Callable[[Sequence[Row]], Result], batch: Sequence[Row]) -> tuple[int, Result]:
    return batch[-1][0], work(batch)


def _shared(
    work: Callable[[Any], Result], items: Iterator[Any], workers: int, alone: Callable[[], bool]
) -> Iterator[Result]:
    for number, item in enumerate(items, start=1):
        yield work(item)
        if number >= _ALONE and not alone():
            break
    else:
        return
    yield from in_order(work, items, workers)


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


def _parts_of(source: str | Path) -> list[str | Path]:
    """Files and hub datasets of a source, in order."""
    parts: list[str | Path] = []
    for item in split_list(source):
        parts += [item] if item.startswith(HUB) else local_files(item)
    refuse_repeated(source, [part for part in parts if isinstance(part, Path)])
    return parts


def _rows(part: str | Path, before: int) -> Iterator[tuple[int, Any]]:
    return file_rows(part, before) if isinstance(part, Path) else hub_rows(part, before)


def _rows_of_all(parts: list[str | Path]) -> Iterator[tuple[int, Any]]:
    number = 0
    for part in parts:
        for number, row in _rows(part, number):  # noqa: B020
            yield number, row
