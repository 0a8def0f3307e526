"""Rows of CSV and TSV files of any size, as objects whose keys are the names in the header."""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treg_megatron.containers.json_rows import row_name
from treg_megatron.containers.magic import open_bytes, text_beginning
from treg_megatron.errors import UserError

_NAME = re.compile(r"\.(csv|tsv)(\.\w+)?$", re.IGNORECASE)
_LONGEST_FIELD = 1 << 30
_DELIMITERS = ",;\t"


def is_csv(path: Path) -> bool:
    """Whether a file is called CSV or TSV, perhaps compressed, and does not begin like JSON."""
    return bool(_NAME.search(path.name)) and text_beginning(path)[:1] not in (b"{", b"[")


def csv_rows(path: Path, before: int = 0) -> Iterator[tuple[int, Any]]:
    """Numbered rows after the header, counted on from ``before``. Values are text; an empty field is None.

    Raises:
        UserError: no usable header, a row with too many or too few fields, or a quote that is not closed.
    """
    csv.field_size_limit(_LONGEST_FIELD)
    local = 0
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True, **_dialect(path))
        try:
            names = _header(next(reader, []), path)
            for fields in reader:
                if not fields:
                    continue
                local += 1
                if len(fields) != len(names):
                    raise UserError(
                        f"{path} {row_name(local, before)} (line {reader.line_num}) has {len(fields)} fields, but the "
                        f"header has {len(names)}: put fields that hold the separator in double quotes"
                    )
                yield before + local, {name: field or None for name, field in zip(names, fields, strict=True) if name}
        except csv.Error as error:
            raise UserError(
                f"{path} {row_name(local + 1, before)} (line {reader.line_num}) is not CSV: {error}"
            ) from None


def _header(names: list[str], path: Path) -> list[str]:
    """The names of the columns; the first may be empty, as pandas calls its index."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: the header names {', '.join(map(repr, twice))} more than once")
    if "" in names[1:]:
        raise UserError(f"{path}: column {names.index('', 1) + 1} has no name in the header")
    return names


def _dialect(path: Path) -> dict[str, Any]:
    """How fields are separated, from the header: one of :data:`_DELIMITERS`, perhaps with a space after each."""
    header = text_beginning(path).splitlines()[:1]
    line = header[0].decode("utf-8", "replace") if header else ""
    tabs = ".tsv" in path.name.lower()
    delimiter = "\t" if tabs else max(_DELIMITERS, key=line.count)  # the first of equals
    return {"delimiter": delimiter, "skipinitialspace": line.count(delimiter) == line.count(f"{delimiter} ")}
