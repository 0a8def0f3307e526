"""Rows of one file of any kind, detected from its first bytes; CSV and TSV, which have none, from the name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treg_megatron.containers.arrow_rows import arrow_rows
from treg_megatron.containers.arrow_values import with_messages
from treg_megatron.containers.csv_rows import csv_rows, is_csv
from treg_megatron.containers.json_portions import Parsed, Portion, json_portions, parsed
from treg_megatron.containers.json_rows import array_from, json_rows, lines_from
from treg_megatron.containers.magic import ARROW_FILE, ARROW_STREAM, DAMAGED, PARQUET, head_of
from treg_megatron.errors import UserError


def file_rows(path: Path, before: int = 0) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a file, counted on from ``before``.

    Raises:
        UserError: the file is missing, of an unsupported kind, or damaged; the message names file and row.
    """
    if head_of(path).startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        return arrow_rows(path, before)
    return _text_rows((csv_rows if is_csv(path) else json_rows)(path, before), path, before)


def file_portions(path: Path) -> Iterator[Portion] | None:
    """The portions of a file that can be parsed apart from each other; None if it has none.

    Raises:
        UserError: as :func:`file_rows`.
    """
    if head_of(path).startswith((PARQUET, ARROW_FILE, ARROW_STREAM)) or is_csv(path):
        return None
    return json_portions(path)


def portion_rows(portion: Portion) -> Parsed | None:
    """The rows of a portion; None if it is to be read by :func:`rows_from`, because it does not parse."""
    found = parsed(portion)
    if found:
        for _, row in found.rows:
            with_messages(row)
    return found


def rows_from(portion: Portion, before: int, local: int, last: int) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a file from the beginning of a portion to the end.

    Args:
        before: number of the last row of the files that came before.
        local: how many rows of this file came before, counting blank lines.
        last: number of the last row before the portion.

    Raises:
        UserError: as :func:`file_rows`.
    """
    rows = (array_from if portion.of_array else lines_from)(portion.path, portion.start, before, local)
    return _text_rows(rows, portion.path, last)


def _text_rows(rows: Iterator[tuple[int, Any]], path: Path, number: int) -> Iterator[tuple[int, Any]]:
    try:
        for number, row in rows:
            yield number, with_messages(row)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text after row {number}: {error.reason}; save it as UTF-8") from None
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read after row {number}: {error}; copy or download it again") from None
