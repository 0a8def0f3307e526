"""Preference pairs in the formats that people have, one after the other, in the order of the file.

To add a format: write the function that turns one row into a :class:`Pair` and give it a line in :data:`FORMATS`.
"""

import codecs
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from treg_megatron.errors import UserError

IDENTICAL_RESPONSES = "identical responses"
REPEATED_PAIR = "repeats an earlier pair"

_CHUNK = 1 << 20                      # characters read at once; a longer row is read in several goes
_LONGEST_TOKEN = 16                   # a JSON literal, number tail or escape that a chunk's end may have cut
_SPACE = " \t\n\r"


class Message(NamedTuple):
    """One turn: ``role`` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Pair:
    """A conversation that ends with a user turn, and two answers to it, one preferred."""

    pair_id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None


class PairFormat(NamedTuple):
    """A kind of file: how its first row is recognised, and how one row is read (raises ``ValueError``)."""

    name: str
    matches: Callable[[dict], bool]
    conversation: Callable[[dict], tuple[tuple[Message, ...], str, str]]


def read_pairs(path: str | Path, drops: Counter[str] | None = None) -> Iterator[Pair]:
    """Read the preference pairs of a JSON array or a JSONL file, whatever its size, in its order.

    The format is recognised by the first row and holds for the whole file. A pair's id is the row's ``pair_id`` or
    ``id``, else a hash of its content. Pairs that can teach nothing are left out and counted by reason in ``drops``:
    identical responses, and rows that repeat an earlier row with the same id and content.

    Raises:
        UserError: the file is missing, is neither of the two kinds, or holds a row that cannot be used. The message
            names the file and the row, counted from 1; in JSONL a row is a line.
    """
    path = Path(path)
    drops = Counter() if drops is None else drops
    seen_ids: set[int] = set()
    seen_pairs: set[int] = set()
    format = None
    for number, row in _rows(path):
        if not isinstance(row, dict):
            raise UserError(f"{path} row {number}: expected a JSON object, got {type(row).__name__}")
        format = format or _recognise(row, path, number)
        try:
            pair, content = _pair(row, format)
        except ValueError as error:
            raise UserError(f"{path} row {number}: {error} (read as {format.name})") from None
        if pair.chosen == pair.rejected:
            drops[IDENTICAL_RESPONSES] += 1
            continue
        identity, whole = _digest(pair.pair_id), _digest(pair.pair_id + content)
        if whole in seen_pairs:
            drops[REPEATED_PAIR] += 1
            continue
        if identity in seen_ids:
            raise UserError(f"{path} row {number}: pair_id {pair.pair_id!r} already belongs to an earlier row with "
                            "other content; give every pair an id of its own, or none")
        seen_ids.add(identity)
        seen_pairs.add(whole)
        yield pair
    if format is None:
        raise UserError(f"{path} holds no pairs")


def conversation_text(messages: tuple[Message, ...]) -> str:
    """A conversation as text for people and prompts: ``Role: content`` paragraphs."""
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)


def _pair(row: dict, format: PairFormat) -> tuple[Pair, str]:
    messages, chosen, rejected = format.conversation(row)
    if not messages or messages[-1].role != "user":
        raise ValueError("the conversation must end with a user turn")
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("a system message may only come first")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise ValueError(f"{name} is an empty response")
    content = json.dumps([messages, chosen, rejected], ensure_ascii=False)
    try:
        content_hash = hashlib.sha256(content.encode()).hexdigest()[:16]
    except UnicodeEncodeError:
        raise ValueError("text with half of a surrogate pair (a \\ud800-like escape), which is no character") from None
    return Pair(_pair_id(row, content_hash), messages, chosen, rejected,
                _score(row, "chosen_score", "score_chosen"), _score(row, "rejected_score", "score_rejected")), content


def _pair_id(row: dict, content_hash: str) -> str:
    given = row.get("pair_id", row.get("id"))
    if given is None:
        return content_hash
    if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
        raise ValueError(f"the pair's id must be a text or an integer, got {given!r}")
    return str(given)


def _score(row: dict, *names: str) -> float | None:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{names[0]} must be a finite number, got {value!r}")
    return float(value)


# -- formats -----------------------------------------------------------------------------------------------------------

def _trl_explicit(row: dict) -> tuple[tuple[Message, ...], str, str]:
    prompt = _required(row, "prompt")
    if isinstance(prompt, str):
        messages = (Message("user", prompt),)
    else:
        messages = _messages(prompt, "prompt", "role", "content", _ROLES)
    return messages, *(_trl_completion(_required(row, name), name) for name in ("chosen", "rejected"))


def _trl_completion(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    messages = _messages(value, name, "role", "content", _ROLES)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise ValueError(f"{name} must be a text or one assistant message")
    return messages[0].content


def _sharegpt(row: dict) -> tuple[tuple[Message, ...], str, str]:
    messages = _messages(_required(row, "conversations"), "conversations", "from", "value", _SHAREGPT_ROLES)
    system = row.get("system")
    if system:
        messages = (Message("system", _text(system, "system")), *messages)
    responses = []
    for name in ("chosen", "rejected"):
        (message,) = _messages([_required(row, name)], name, "from", "value", _SHAREGPT_ROLES)
        if message.role != "assistant":
            raise ValueError(f"{name} must come from the assistant (gpt)")
        responses.append(message.content)
    return messages, *responses


FORMATS = (
    PairFormat("LLaMA-Factory sharegpt", lambda row: {"conversations", "chosen", "rejected"} <= row.keys(), _sharegpt),
    PairFormat("TRL explicit prompt", lambda row: {"prompt", "chosen", "rejected"} <= row.keys(), _trl_explicit),
)

_ROLES = {role: role for role in ("system", "user", "assistant")}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", **_ROLES}


def _recognise(row: dict, path: Path, number: int) -> PairFormat:
    for format in FORMATS:
        if format.matches(row):
            return format
    keys = ", ".join(map(repr, row)) or "none"
    raise UserError(f"{path} row {number}: keys {keys} are no known kind of preference pair; "
                    f"known: {'; '.join(format.name for format in FORMATS)}")


def _required(row: dict, name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"key {name!r} is missing")
    return row[name]


def _messages(value: Any, name: str, role_key: str, content_key: str, roles: dict[str, str]) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of messages, got {type(value).__name__}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {role_key, content_key} <= message.keys():
            raise ValueError(f"each message of {name} must be an object with {role_key!r} and {content_key!r}")
        role = message[role_key]
        if not isinstance(role, str) or role not in roles:
            raise ValueError(f"unknown {role_key} {role!r} in {name}; known: {', '.join(roles)}")
        messages.append(Message(roles[role], _text(message[content_key], f"{content_key} in {name}")))
    return tuple(messages)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}")
    return value


# -- rows of a file ----------------------------------------------------------------------------------------------------

def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        stream = open(path, encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"pairs file {path} cannot be read: {error.strerror}") from None
    number = 0
    with stream:
        try:
            while (first := stream.read(1)) and first in _SPACE:
                pass
            if first == "[":
                rows = _array_elements(stream, path)
            else:
                stream.seek(0)
                rows = _json_lines(stream, path)
            for number, row in rows:
                yield number, row
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text after row {number}: {error.reason}") from None


def _json_lines(stream: codecs.StreamReader, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(stream, start=1):
        if line.strip(_SPACE):
            try:
                yield number, json.loads(line.strip("\ufeff"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} row {number} does not parse as JSON: {error}") from None


def _array_elements(stream: codecs.StreamReader, path: Path) -> Iterator[tuple[int, Any]]:
    """Elements of the JSON array whose ``[`` was just read, one by one: memory holds one chunk or one element."""
    text = _Lookahead(stream)
    if text.skip_space() == "]":
        text.position += 1
    else:
        number = 0
        while True:
            number += 1
            try:
                value = text.decode()
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} row {number} does not parse as JSON: {error}") from None
            yield number, value
            after = text.skip_space()
            text.position += 1
            if after == "]":
                break
            if after != ",":
                raise UserError(f"{path} row {number} is not followed by ',' or ']' but by "
                                f"{repr(after) if after else 'the end of the file: it is cut off'}")
            text.skip_space()
    if extra := text.skip_space():
        raise UserError(f"{path}: {extra!r} follows the closing ']' of the array")


class _Lookahead:
    """The part of a text stream around the next JSON value."""

    def __init__(self, stream: codecs.StreamReader):
        self.stream, self.text, self.position, self.ended = stream, "", 0, False
        self.decoder = json.JSONDecoder()

    def read_on(self) -> None:
        more = self.stream.read(max(_CHUNK, len(self.text) - self.position))
        self.text, self.position = self.text[self.position:] + more, 0
        self.ended = not more

    def skip_space(self) -> str:
        """The next character that is no white space, which is not consumed; empty at the end of the stream."""
        while True:
            while self.position < len(self.text):
                if self.text[self.position] not in _SPACE:
                    return self.text[self.position]
                self.position += 1
            if self.ended:
                return ""
            self.read_on()

    def decode(self) -> Any:
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
                if end < len(self.text) or self.ended:      # a number may go on in the next chunk
                    self.position = end
                    return value
            except json.JSONDecodeError as error:
                cut_off = error.msg.startswith("Unterminated string") or error.pos + _LONGEST_TOKEN > len(self.text)
                if self.ended or not cut_off:
                    raise ValueError(error.msg) from None
            self.read_on()


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
