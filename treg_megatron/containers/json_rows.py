"""Rows of JSON and JSONL files of any size.

JSONL               one object per line
JSON                an array; one object whose only value is an array; or objects printed over several lines
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from treg_megatron.containers.arrow_values import MESSAGE_KEYS
from treg_megatron.containers.magic import DAMAGED, open_bytes, text_beginning
from treg_megatron.errors import UserError

ARRAY, LINES, VALUES, NOTHING = "array", "lines", "values", "nothing"

_CHUNK = 1 << 20  # bytes read at once; a longer row takes several reads
_LONGEST_TOKEN = 16  # longest JSON literal, number tail or escape that the end of a chunk may cut
_SPACE = " \t\n\r\ufeff"
_BEGINS_WITH_A_LIST = re.compile(rb'\{\s*("(?:[^"\\]|\\.)*")\s*:\s*\[')


def json_rows(path: Path, before: int = 0) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a JSON or JSONL file, counted on from ``before``; in JSONL, rows are lines.

    Raises:
        UserError: a row does not parse.
    """
    layout, key = layout_of(path)
    if layout == ARRAY:
        yield from _array(path, before, key)
    elif layout == VALUES:
        yield from _values(path, before)
    elif layout == LINES:
        yield from lines_from(path, 0, before, 0)


def layout_of(path: Path) -> tuple[str, str | None]:
    """How the rows of a file are written, and the key of the object whose only value they are, if there is one.

    Raises:
        UserError: the file is not text.
    """
    head = text_beginning(path)
    if head.startswith(b"["):
        return ARRAY, None
    if (key := _BEGINS_WITH_A_LIST.match(head)) and _holds_only_a_list(path):
        return ARRAY, json.loads(key[1])
    if re.match(rb"\{\s*\n", head):
        return VALUES, None
    return (LINES if head else NOTHING), None


def row_name(local: int, before: int) -> str:
    """How messages call a row of a file that comes after ``before`` rows of other files."""
    return f"row {before + local} (row {local} of this file)" if before else f"row {local}"


def lines(stream: BinaryIO, path: Path, before: int, local: int = 0) -> Iterator[tuple[int, Any]]:
    """Numbered rows of the lines of a stream, of which ``local`` lines of ``path`` came before.

    Raises:
        UserError: a line does not parse.
        UnicodeDecodeError: a line is not UTF-8.
    """
    for line in stream:
        for part in parts_of_line(line):
            local += 1
            if part.isspace() or not part:
                continue
            text = str(part, "utf-8")
            try:
                yield before + local, json.loads(text.strip("\ufeff") if text[0] == "\ufeff" else text)
            except (ValueError, RecursionError) as error:
                raise _does_not_parse(path, local, before, error, text) from None


def lines_from(path: Path, start: int, before: int, local: int) -> Iterator[tuple[int, Any]]:
    """Numbered rows of the lines of a file from the byte ``start``, where line ``local`` has ended.

    Raises:
        UserError: a line does not parse.
        UnicodeDecodeError: a line is not UTF-8.
    """
    with open_bytes(path) as stream:
        if start:
            stream.seek(start)
        yield from lines(stream, path, before, local)


def parts_of_line(line: bytes) -> tuple[bytes, ...] | list[bytes]:
    """The lines in what ends in one line feed: one, unless lines end in carriage returns."""
    return line.rstrip(b"\r\n").split(b"\r") if b"\r" in line else (line,)


def _does_not_parse(path: Path, local: int, before: int, error: Exception, text: str = "") -> UserError:
    hint = "; JSON has double quotes only, and json.dumps writes it" if text.startswith("{'") else ""
    return UserError(f"{path} {row_name(local, before)} does not parse as JSON: {error}{hint}")


def _array(path: Path, before: int, key: str | None = None) -> Iterator[tuple[int, Any]]:
    with open_bytes(path) as stream:
        text = _Lookahead(stream)
        text.enter_object() if key is not None else text.expect("[")
        yield from _elements(text, path, before)
        if key is not None:
            text.expect("}")
        else:
            _require_end(text, path)


def array_from(path: Path, start: int, before: int, local: int) -> Iterator[tuple[int, Any]]:
    """Numbered rows of an array from the byte ``start``, which follows the comma behind row ``local`` or the bracket.

    Raises:
        UserError: as :func:`json_rows`.
    """
    with open_bytes(path) as stream:
        stream.seek(start)
        text = _Lookahead(stream, encoding="utf-8")
        yield from _elements(text, path, before, local)
        _require_end(text, path)


def _require_end(text: "_Lookahead", path: Path) -> None:
    if extra := text.skip_space():
        raise UserError(f"{path}: {extra!r} follows the closing ']' of the array")


def _holds_only_a_list(path: Path) -> bool:
    """Whether a file that begins with a list under a key holds a list of rows and nothing else; else it is JSONL."""
    rows = 0
    with open_bytes(path) as stream:
        text = _Lookahead(stream)
        try:
            text.enter_object()
            for _, value in _elements(text, path, 0):
                rows += 1
                if not isinstance(value, dict) or any(keys <= value.keys() for keys in MESSAGE_KEYS):
                    return False
        except DAMAGED:
            return rows > 0
        except UnicodeDecodeError:
            return False
        except UserError as error:
            if rows == 0:
                return False
            raise UserError(f"{error}, in the list with which the file begins") from None
        if text.skip_space() != "}":
            return False
        text.expect("}")
        return not text.skip_space()


def _values(path: Path, before: int) -> Iterator[tuple[int, Any]]:
    with open_bytes(path) as stream:
        text, local = _Lookahead(stream), 0
        while text.skip_space():
            local += 1
            yield before + local, _decoded(text, path, local, before)


def _elements(text: "_Lookahead", path: Path, before: int, local: int = 0) -> Iterator[tuple[int, Any]]:
    """Elements of the JSON array whose ``[`` was just read, one by one: memory holds one chunk or one element.

    ``local`` elements of the array came before.
    """
    if local == 0 and text.skip_space() == "]":
        text.expect("]")
        return
    after = ","
    while after == ",":
        local += 1
        text.skip_space()
        yield before + local, _decoded(text, path, local, before)
        after = text.skip_space()
        text.position += 1
        if after not in ("]", ","):
            raise UserError(
                f"{path} {row_name(local, before)} is not followed by ',' or ']' but by "
                f"{repr(after) if after else 'the end of the file: it is cut off'}"
            )


def _decoded(text: "_Lookahead", path: Path, local: int, before: int) -> Any:
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise _does_not_parse(path, local, before, error) from None


class _Lookahead:
    """The part of a text around the next JSON value."""

    def __init__(self, stream: BinaryIO, encoding: str = "utf-8-sig"):
        self.stream, self.text, self.position, self.ended = stream, "", 0, False
        self.decoder = json.JSONDecoder()
        self._utf8 = codecs.getincrementaldecoder(encoding)()
        self._not_text: UnicodeDecodeError | None = None

    def read_more(self) -> None:
        """Read on. What is not UTF-8 raises as soon as all before it has been used."""
        if self._not_text:
            raise self._not_text
        data = self.stream.read(max(_CHUNK, len(self.text) - self.position))
        try:
            more = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            self._not_text = error
            more = str(error.object[: error.start], "utf-8")
        self.text, self.position = self.text[self.position :] + more, 0
        self.ended = not data and self._not_text is None

    def skip_space(self) -> str:
        """The next non-whitespace character, without consuming it; empty at the end of the stream."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in _SPACE:
                    return self.text[self.position]
                self.position += 1
            if self.ended:
                return ""
            self.read_more()

    def expect(self, character: str) -> None:
        """Consume ``character``, which the caller knows to come next."""
        assert self.skip_space() == character
        self.position += 1

    def enter_object(self) -> None:
        """Consume ``{"KEY": [``."""
        self.expect("{")
        self.skip_space()
        self.decode()
        self.expect(":")
        self.expect("[")

    def decode(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
                if end < len(self.text) or self.ended:  # a number may continue in the next chunk
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos + _LONGEST_TOKEN > len(self.text)
                if self.ended or not cut_off:
                    raise ValueError(error.msg) from None
            self.read_more()
