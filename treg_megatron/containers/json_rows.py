"""Rows of JSON and JSONL files of any size.

JSONL               one object per line
JSON                an array; one object whose only value is an array; or objects printed over several lines
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from treg_megatron.containers.arrow_values import MESSAGE_KEYS
from treg_megatron.containers.magic import DAMAGED, open_bytes, text_beginning
from treg_megatron.errors import UserError

_CHUNK = 1 << 20  # characters read at once; a longer row takes several reads
_LONGEST_TOKEN = 16  # longest JSON literal, number tail or escape that the end of a chunk may cut
_SPACE = " \t\n\r"
_BEGINS_WITH_A_LIST = re.compile(rb'\{\s*("(?:[^"\\]|\\.)*")\s*:\s*\[')


def json_rows(path: Path, before: int = 0) -> Iterator[tuple[int, Any]]:
    """Numbered rows of a JSON or JSONL file, counted on from ``before``; in JSONL, rows are lines.

    Raises:
        UserError: a row does not parse.
    """
    head = text_beginning(path)
    if head.startswith(b"["):
        yield from _array(path, before)
    elif (key := _BEGINS_WITH_A_LIST.match(head)) and _holds_only_a_list(path):
        yield from _array(path, before, key=json.loads(key[1]))
    elif re.match(rb"\{\s*\n", head):
        yield from _values(path, before)
    elif head:
        with open_bytes(path) as stream:
            yield from _lines(stream, path, before)


def row_name(local: int, before: int) -> str:
    """How messages call a row of a file that comes after ``before`` rows of other files."""
    return f"row {before + local} (row {local} of this file)" if before else f"row {local}"


def _lines(stream: BinaryIO, path: Path, before: int) -> Iterator[tuple[int, Any]]:
    local = 0
    for line in stream:
        for part in line.rstrip(b"\r\n").split(b"\r") if b"\r" in line else (line,):
            local += 1
            if part.isspace() or not part:
                continue
            text = str(part, "utf-8")
            try:
                yield before + local, json.loads(text.strip("\ufeff") if text[0] == "\ufeff" else text)
            except (ValueError, RecursionError) as error:
                raise _does_not_parse(path, local, before, error, text) from None


def _does_not_parse(path: Path, local: int, before: int, error: Exception, text: str = "") -> UserError:
    hint = "; JSON has double quotes only, and json.dumps writes it" if text.startswith("{'") else ""
    return UserError(f"{path} {row_name(local, before)} does not parse as JSON: {error}{hint}")


def _array(path: Path, before: int, key: str | None = None) -> Iterator[tuple[int, Any]]:
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as stream:
        text = _Lookahead(stream)
        text.enter_object() if key is not None else text.expect("[")
        yield from _elements(text, path, before)
        if key is not None:
            text.expect("}")
        elif extra := text.skip_space():
            raise UserError(f"{path}: {extra!r} follows the closing ']' of the array")


def _holds_only_a_list(path: Path) -> bool:
    """Whether a file that begins with a list under a key holds a list of rows and nothing else; else it is JSONL."""
    rows = 0
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as stream:
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
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as stream:
        text, local = _Lookahead(stream), 0
        while text.skip_space():
            local += 1
            yield before + local, _decoded(text, path, local, before)


def _elements(text: "_Lookahead", path: Path, before: int) -> Iterator[tuple[int, Any]]:
    """Elements of the JSON array whose ``[`` was just read, one by one: memory holds one chunk or one element."""
    if text.skip_space() == "]":
        text.expect("]")
        return
    local, after = 0, ","
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
    """The part of a text stream around the next JSON value."""

    def __init__(self, stream: TextIO):
        self.stream, self.text, self.position, self.ended = stream, "", 0, False
        self.decoder = json.JSONDecoder()

    def read_more(self) -> None:
        more = self.stream.read(max(_CHUNK, len(self.text) - self.position))
        self.text, self.position = self.text[self.position :] + more, 0
        self.ended = not more

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
