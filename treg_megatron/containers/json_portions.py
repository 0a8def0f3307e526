"""Portions of a large JSONL file or JSON array, each of which a process of its own can parse.

Cutting costs little: lines end in line feeds, and the elements of an array are told apart by brackets outside of
strings. Nothing is judged here. What does not parse is read once more from the portion's beginning as :mod:`json_rows`
reads it, so that the rows, their numbers and every message are the same.
"""

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from treg_megatron.containers.json_rows import ARRAY, LINES, layout_of, lines, parts_of_line
from treg_megatron.containers.magic import is_compressed
from treg_megatron.errors import UserError

PORTION = 1 << 20  # bytes; a longer row makes a longer portion

_SHORT, _REMEMBERED = 64, 4096
_BRACKET = re.compile(rb"([\[\]{}])")
_DEPTH = {b"[": 1, b"{": 1, b"]": -1, b"}": -1}


class Portion(NamedTuple):
    """Whole lines of a JSONL file, or whole elements of a JSON array with the commas between them.

    Attributes:
        path: the file.
        start: the portion's first byte.
        data: its bytes; None for the end of the file, which is not cut.
        of_array: whether it holds elements of an array.
    """

    path: Path
    start: int
    data: bytes | None
    of_array: bool


class Parsed(NamedTuple):
    """What a portion holds: rows with their numbers in it, from 1, and how many numbers it takes, blank lines too."""

    rows: list[tuple[int, Any]]
    numbers: int


def json_portions(path: Path) -> Iterator[Portion] | None:
    """The portions of a file in order; None for a file that is compressed or written in another way.

    Raises:
        UserError: the file is not text.
    """
    if is_compressed(path):
        return None
    layout, key = layout_of(path)
    if layout == LINES:
        return _portions(path, 0, lambda data: data.rfind(b"\n") + 1, of_array=False)
    if layout == ARRAY and key is None and (start := _beginning(path)):
        return _portions(path, start, end_of_elements, of_array=True)
    return None


def parsed(portion: Portion) -> Parsed | None:
    """The rows of a portion; None if it is to be read as :mod:`json_rows` reads it, because it does not parse."""
    if portion.data is None:
        return None
    try:
        if portion.of_array:
            elements = json.loads(f"[{str(portion.data, 'utf-8')[:-1]}]")
            return Parsed(list(enumerate(elements, start=1)), len(elements)) if elements else None
        rows = list(lines(io.BytesIO(portion.data), portion.path, 0))
        return Parsed(rows, _count_lines(portion.data))
    except (UserError, ValueError, RecursionError):
        return None


def end_of_elements(data: bytes) -> int:
    """Where the last whole element of an array that ``data`` begins with ends, behind its comma; 0 if none does.

    ``data`` begins with an element. Of what is not valid JSON, any place may be returned.
    """
    if b'\\"' in data:
        data = data.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    parts = data.split(b'"')
    depth = found = 0
    place = -1
    for i in range(0, len(parts), 2):  # the others are inside of strings
        change, commas = _known.get(parts[i]) or _brackets(parts[i])
        if -depth in commas:
            found, place = i, commas[-depth]
        depth += change
    return sum(map(len, parts[:found])) + found + place + 1


def _brackets(text: bytes) -> tuple[int, dict[int, int]]:
    """How the depth changes over a text outside of strings, and the last comma at each depth."""
    depth = place = 0
    commas: dict[int, int] = {}
    for piece in _BRACKET.split(text):
        if piece in _DEPTH:
            depth += _DEPTH[piece]
        elif b"," in piece:
            commas[depth] = place + piece.rindex(b",")
        place += len(piece)
    if len(text) <= _SHORT:
        if len(_known) >= _REMEMBERED:
            _known.clear()
        _known[text] = depth, commas
    return depth, commas


_known: dict[bytes, tuple[int, dict[int, int]]] = {}


def _beginning(path: Path) -> int:
    """The byte behind the bracket with which an array begins; 0 if it is not among the first ones."""
    with open(path, "rb") as stream:
        return stream.read(PORTION).find(b"[") + 1


def _portions(path: Path, start: int, cut: Callable[[bytes], int], of_array: bool) -> Iterator[Portion]:
    """Portions from a byte on, up to where ``cut`` says that the whole rows of some bytes end."""
    try:
        with open(path, "rb") as stream:
            stream.seek(start)
            for data in _cut(stream, cut):
                yield Portion(path, start, data, of_array)
                start += len(data)
    except OSError:
        pass  # whoever reads the rest meets it, too, and knows the row
    yield Portion(path, start, None, of_array)


def _cut(stream: BinaryIO, cut: Callable[[bytes], int]) -> Iterator[bytes]:
    rest, size = b"", PORTION
    while more := stream.read(size):
        data = rest + more
        end = cut(data)
        if end:
            yield data[:end]
        rest = data[end:]
        size = max(PORTION, len(rest))  # so that a long row is not looked through again and again


def _count_lines(data: bytes) -> int:
    if b"\r" not in data:
        return data.count(b"\n") + (not data.endswith(b"\n"))
    return sum(len(parts_of_line(line)) for line in io.BytesIO(data))
