"""Streaming reader of preference pairs from files of any supported format."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treg_megatron.data.formats import AUTO, FORMATS, Answered, NoPreference, PairFormat
from treg_megatron.data.records import read_rows
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils.string_set import StringSet

IDENTICAL_RESPONSES = "identical responses"
REPEATED_PAIR = "repeats an earlier pair"
EQUAL_SCORES = "equal scores or ranks"


@dataclass(frozen=True)
class Pair:
    """A preference pair: a conversation that ends with a user turn, and a chosen and a rejected response to it.

    For sampled responses, ``chosen_ids`` and ``rejected_ids`` are the sampled token ids, with the end-of-turn token if
    the model ended its turn, and ``tokenizer`` is the hash of the tokenizer they were sampled with.
    """

    pair_id: str
    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    chosen_ids: tuple[int, ...] | None = None
    rejected_ids: tuple[int, ...] | None = None
    tokenizer: str | None = None


def read_pairs(
    source: str | Path,
    drops: Counter[str] | None = None,
    format: str = AUTO,
    unusable: Callable[[str], None] | None = None,
) -> Iterator[Pair]:
    """Stream the preference pairs of a file, folder or hub dataset (:mod:`treg_megatron.data.records`) of any size.

    The format is detected from the first record and applies to the whole file. A pair's id is the record's
    ``pair_id`` or ``id``, else a hash of its content. Pairs without a training signal are dropped and counted by reason
    in ``drops``: identical responses, equal scores, and records that repeat an earlier id and content.

    Args:
        format: the name of one of :data:`~treg_megatron.data.formats.FORMATS`, or ``auto``.
        unusable: called with a message for each unusable record, instead of raising.

    Raises:
        UserError: the file is missing, its format is not recognised, or it holds an unusable record. The message names
            the file and the record's number, counted from 1 ("row"); in JSONL that is the line.
    """
    for pair, _ in read_pairs_and_rows(source, drops, format, unusable):
        yield pair


def read_pairs_and_rows(
    source: str | Path,
    drops: Counter[str] | None = None,
    format: str = AUTO,
    unusable: Callable[[str], None] | None = None,
) -> Iterator[tuple[Pair, dict]]:
    """Like :func:`read_pairs`, with the record that each pair was read from."""
    drops = Counter() if drops is None else drops
    reader = None if format == AUTO else format_named(format)
    seen_ids, seen_pairs = StringSet(), StringSet()
    for number, row in read_rows(source):
        try:
            if not isinstance(row, dict):
                raise ValueError(f"expected a JSON object, got {type(row).__name__}")
            reader = reader or recognise(row)
            try:
                pair, content = _pair(row, reader)
            except ValueError as error:
                raise ValueError(f"{error} (read as {reader.name})") from None
            identity = pair.pair_id + content
            if pair.chosen == pair.rejected:
                drops[IDENTICAL_RESPONSES] += 1
            elif identity in seen_pairs:
                drops[REPEATED_PAIR] += 1
            elif pair.pair_id in seen_ids:
                raise ValueError(
                    f"pair_id {pair.pair_id!r} already belongs to an earlier row with different content; give "
                    "every pair a unique id, or none"
                )
            else:
                seen_ids.add(pair.pair_id)
                seen_pairs.add(identity)
                yield pair, row
        except NoPreference:
            drops[EQUAL_SCORES] += 1
        except ValueError as error:
            if unusable is None:
                raise UserError(f"{source} row {number}: {error}") from None
            unusable(f"row {number}: {error}")
    if reader is None:
        raise UserError(f"{source} holds no pairs")


def recognise(row: dict) -> PairFormat:
    """Detect the format of a record.

    Raises:
        ValueError: no format matches.
    """
    for format in FORMATS:
        if format.matches(row):
            return format
    keys = ", ".join(map(repr, row)) or "none"
    raise ValueError(
        f"unrecognised preference format with keys {keys}; supported: "
        + "; ".join(f"{format.name} ({format.keys})" for format in FORMATS)
    )


def format_named(name: str) -> PairFormat:
    """Look up a format by name.

    Raises:
        UserError: no format has this name.
    """
    for format in FORMATS:
        if format.name == name:
            return format
    raise UserError(f"pairs format {name!r} is not known; choose {AUTO} or one of {', '.join(f.name for f in FORMATS)}")


def conversation_text(messages: tuple[Message, ...]) -> str:
    """A conversation as ``Role: content`` paragraphs, for display and for prompts."""
    return "\n\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)


def _pair(row: dict, format: PairFormat) -> tuple[Pair, str]:
    answered: Answered = format.read(row)
    messages, chosen, rejected = answered[:3]
    if not messages or messages[-1].role != "user":
        raise ValueError("the conversation must end with a user turn")
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("a system message may only come first")
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise ValueError(f"{name} is an empty response")
    content = json.dumps([[m.as_list() for m in messages], chosen, rejected], ensure_ascii=False)
    try:
        content_hash = hashlib.sha256(content.encode()).hexdigest()[:16]
        pair_id = _pair_id(row, content_hash)
        pair_id.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "text with half of a surrogate pair (an escape such as \\ud800), which is not a valid character"
        ) from None
    return Pair(
        pair_id,
        messages,
        chosen,
        rejected,
        _score(answered.chosen_score, "chosen_score"),
        _score(answered.rejected_score, "rejected_score"),
        *_sampled_ids(row),
    ), content


def _sampled_ids(row: dict) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None, str | None]:
    names = ("chosen_ids", "rejected_ids", "tokenizer")
    if all(row.get(name) is None for name in names[:2]):
        return None, None, None
    if any(row.get(name) is None for name in names):
        raise ValueError(f"{', '.join(names)} go together: give all three, or none")
    for name in names[:2]:
        ids = row[name]
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{name} must be a list of token ids, at least one")
    return tuple(row["chosen_ids"]), tuple(row["rejected_ids"]), str(row["tokenizer"])


def _pair_id(row: dict, content_hash: str) -> str:
    given = row.get("pair_id") if row.get("pair_id") is not None else row.get("id")
    if given is None:
        return content_hash
    if isinstance(given, bool) or not isinstance(given, (str, int)) or given == "":
        raise ValueError(f"the pair's id must be a string or an integer, got {given!r}")
    return str(given)


def _score(value: Any, name: str) -> float | None:
    if value is None:
        return None
    try:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be a finite number, got {str(value)[:40]}") from None
