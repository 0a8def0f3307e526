"""Rows of Parquet and Arrow files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treg_megatron.containers.arrow_values import conversions
from treg_megatron.containers.magic import ARROW_FILE, PARQUET, head_of
from treg_megatron.errors import UserError

_ROWS_AT_ONCE = 512
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def arrow_rows(path: Path, before: int = 0) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a Parquet file, an Arrow stream or an Arrow file, counted on from ``before``.

    Raises:
        UserError: the file is damaged, or a column holds what JSON could not.
    """
    import pyarrow as pa

    head, number, convert = head_of(path), before, None
    batches = _parquet if head.startswith(PARQUET) else _arrow_file if head.startswith(ARROW_FILE) else _arrow_stream
    try:
        for batch in batches(path):
            if convert is None:
                convert = conversions(batch.schema)
            for row in batch.to_pylist():
                for name, change in convert.items():
                    row[name] = change(row[name])
                number += 1
                yield number, row
    except UserError as error:
        raise UserError(f"{path}{f' row {number + 1}' if convert is not None else ''}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} after row {number}: text that is not UTF-8 ({error.reason})") from None
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a duplicate column, a date out of range
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read after row {number}: {reason}; copy or make it again") from None


def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    file, rows = pq.ParquetFile(path, page_checksum_verification=True), 0
    for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
        rows += batch.num_rows
        yield batch
    if rows != file.metadata.num_rows:  # a damaged page can look like a page type that readers skip
        raise ValueError(f"{file.metadata.num_rows} rows expected from the metadata: the file is damaged")


def _arrow_file(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as batches:
        for number in range(batches.num_record_batches):
            yield from _validated(batches.get_batch(number))


def _arrow_stream(path: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as batches:
        for batch in batches:
            yield from _validated(batch)
        end = source.tell()
        source.seek(max(end - len(_END_OF_STREAM), 0))
        if source.read() != _END_OF_STREAM:  # readers treat truncation, or zeros instead of a length, as the end
            raise ValueError(f"the stream ends at byte {end}, the file is damaged")


def _validated(batch: Any) -> Iterator[Any]:
    batch.validate(full=True)  # offsets of a damaged file could point outside the file
    for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
        yield batch.slice(start, _ROWS_AT_ONCE)
