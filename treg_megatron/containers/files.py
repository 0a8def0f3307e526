"""Rows of one file of any kind, detected from its first bytes; CSV and TSV, which have none, from the name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treg_megatron.containers.arrow_rows import arrow_rows
from treg_megatron.containers.arrow_values import with_messages
from treg_megatron.containers.csv_rows import csv_rows, is_csv
from treg_megatron.containers.json_rows import json_rows
from treg_megatron.containers.magic import ARROW_FILE, ARROW_STREAM, DAMAGED, PARQUET, head_of
from treg_megatron.errors import UserError


def file_rows(path: Path, before: int = 0) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a file, counted on from ``before``.

    Raises:
        UserError: the file is missing, of an unsupported kind, or damaged; the message names file and row.
    """
    if head_of(path).startswith((PARQUET, ARROW_FILE, ARROW_STREAM)):
        return arrow_rows(path, before)
    return _text_rows(path, before)


def _text_rows(path: Path, before: int) -> Iterator[tuple[int, Any]]:
    number = before
    try:
        for number, row in (csv_rows if is_csv(path) else json_rows)(path, before):
            yield number, with_messages(row)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text after row {number}: {error.reason}; save it as UTF-8") from None
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read after row {number}: {error}; copy or download it again") from None
