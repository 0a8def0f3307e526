"""Streaming reader of preference pairs from files of any supported format."""

import decimal
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treg_megatron.config.schema import LabelSection
from treg_megatron.data.records import read_rows
from treg_megatron.errors import UserError
from treg_megatron.formats import AUTO, format_named, recognise
from treg_megatron.formats.audit import unread_columns
from treg_megatron.formats.beside import with_columns_beside
from treg_megatron.formats.columns import ColumnsFormat, mapped_row
from treg_megatron.formats.pair_format import Answer, Answered, NoPreference, PairFormat
from treg_megatron.formats.templated import beginning_of_template, spelled_end
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils.string_set import HashSet

IDENTICAL_RESPONSES = "identical responses"
REPEATED_PAIR = "repeats an earlier pair"
EQUAL_SCORES = "equal scores or ranks"

LARGEST_WEIGHT = 1000.0

NO_SCORE = "score that is not a finite number, read as none"
NO_ID = "id that is neither a text nor an integer, read as none"


@dataclass(frozen=True)
class Pair:
    """A preference pair: a conversation that ends with a user turn, and a chosen and a rejected response to it.

    For sampled responses, ``chosen_ids`` and ``rejected_ids`` are the sampled token ids, with the end-of-turn token if
    the model ended its turn, and ``tokenizer`` is the hash of the tokenizer they were sampled with.

    An answer of several turns, or of one that is more than text, is in ``chosen_turns`` or ``rejected_turns``, and
    ``chosen`` or ``rejected`` shows it as text.

    ``tools`` are the functions that the conversation may call, as the text of a JSON list; ``pair_weight`` is a factor
    of the pair's loss, None where the record has none; ``own`` are the record's columns of token rewards, for those who
    read them; ``row`` is the number of the record.
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
    tools: str = ""
    chosen_turns: tuple[Message, ...] = ()
    rejected_turns: tuple[Message, ...] = ()
    pair_weight: float | None = None
    own: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    row: int = field(default=0, compare=False)

    @property
    def content(self) -> str:
        """The JSON text that the pair's identity is made of."""
        answers = (self.chosen_turns or self.chosen, self.rejected_turns or self.rejected)
        return _content(Answered(self.messages, *answers, tools=self.tools))


@dataclass(frozen=True)
class Reading:
    """How records are read.

    Attributes:
        format: name of one of :data:`~treg_megatron.formats.FORMATS`; ``auto`` recognises it from the first record.
        columns: the user's own column for each field (:data:`~treg_megatron.formats.columns.FIELDS`) instead of a
            format; empty: a format.
        ignore: columns that are left out on purpose.
    """

    format: str = AUTO
    columns: Mapping[str, str] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()

    def __post_init__(self):
        if self.columns and self.format != AUTO:
            raise UserError(f"label.columns and label.format={self.format} exclude each other: give one of them")

    @classmethod
    def of(cls, section: LabelSection) -> "Reading":
        """As the recipe's section ``label`` says."""
        return cls(section.format, dict(section.columns), tuple(section.ignore))

    def chosen_format(self) -> PairFormat | None:
        """The format that the user names, by columns or by name; None if it is to be recognised.

        Raises:
            UserError: no format has this name, or the columns do not make one.
        """
        if self.columns:
            return ColumnsFormat(self.columns).format
        return None if self.format == AUTO else format_named(self.format)


def read_pairs(
    source: str | Path,
    drops: Counter[str] | None = None,
    reading: Reading | None = None,
    unusable: Callable[[str], None] | None = None,
    notes: Counter[str] | None = None,
) -> Iterator[Pair]:
    """Stream the preference pairs of a file, folder or hub dataset (:mod:`treg_megatron.data.records`) of any size.

    The format is detected from the first record and applies to the whole file. A pair's id is the record's
    ``pair_id`` or ``id``, else a hash of its content. Pairs without a training signal are dropped and counted by reason
    in ``drops``: identical responses, equal scores, and records that repeat an earlier id and content.

    Args:
        reading: format, columns and columns to ignore; None: the format is recognised.
        unusable: called with a message for each unusable record, instead of raising.
        notes: counts of scores and ids that cannot be used and are read as none.

    Raises:
        UserError: the file is missing, its format is not recognised, or it holds an unusable record. The message names
            the file and the record's number, counted from 1 ("row"); in JSONL that is the line.
    """
    for pair, _ in read_pairs_and_rows(source, drops, reading, unusable, notes):
        yield pair


def read_pairs_and_rows(
    source: str | Path,
    drops: Counter[str] | None = None,
    reading: Reading | None = None,
    unusable: Callable[[str], None] | None = None,
    notes: Counter[str] | None = None,
) -> Iterator[tuple[Pair, dict]]:
    """Like :func:`read_pairs`, with the record that each pair was read from."""
    drops = Counter() if drops is None else drops
    reader, repeats = PairReader(reading, notes), Repeats()
    empty = True
    for number, row in read_rows(source):
        empty = False
        try:
            pair = reader.pair(number, row)
            reason = without_signal(pair) or repeats.reason(pair.pair_id, *identity_hashes(pair))
        except NoPreference:
            drops[EQUAL_SCORES] += 1
        except ValueError as error:
            if unusable is None:
                raise UserError(f"{source} row {number}: {error}") from None
            unusable(f"row {number}: {error}")
        else:
            if reason:
                drops[reason] += 1
            else:
                yield pair, row
    if empty:
        raise no_pairs(source)


class PairReader:
    """Reads records as pairs: all in the format of the first record that is in a known one, unless one is named.

    Attributes:
        format: the format; None before it is known.
        notes: counts of scores and ids that cannot be used and are read as none.
    """

    def __init__(self, reading: Reading | None = None, notes: Counter[str] | None = None):
        self.reading = reading or Reading()
        self.format = self.reading.chosen_format()
        self.notes: Counter[str] = Counter() if notes is None else notes

    def pair(self, number: int, row: Any) -> Pair:
        """The pair of a record.

        Raises:
            ValueError: it cannot be used.
            NoPreference: its answers have equal ranks or scores.
        """
        if not isinstance(row, dict):
            raise ValueError(f"expected a JSON object, got {type(row).__name__}")
        self.format = self.format or recognise(row)
        try:
            return _pair(number, row, self.format, self.reading, self.notes)
        except ValueError as error:
            raise ValueError(f"{error} (read as {self.format.name})") from None


def without_signal(pair: Pair) -> str:
    """Why nothing can be learnt from a pair by itself; empty if something can."""
    if pair.chosen == pair.rejected:
        return IDENTICAL_RESPONSES
    return EQUAL_SCORES if pair.chosen_score is not None and pair.chosen_score == pair.rejected_score else ""


def identity_hashes(pair: Pair) -> tuple[int, int]:
    """Hashes of a pair's id and of all that it is, equal in this process and those that it forks."""
    answers = (pair.chosen_turns or pair.chosen, pair.rejected_turns or pair.rejected)
    return hash(pair.pair_id), hash((pair.pair_id, pair.messages, answers, pair.tools))


class Repeats:
    """The pairs of a source so far."""

    def __init__(self) -> None:
        self._ids, self._pairs = HashSet(), HashSet()

    def reason(self, pair_id: str, id_hash: int, pair_hash: int) -> str:
        """Why one more pair is dropped; empty if it is not.

        Raises:
            ValueError: an earlier pair has the same id and other content.
        """
        if pair_hash in self._pairs:
            return REPEATED_PAIR
        if id_hash in self._ids:
            raise ValueError(
                f"pair_id {pair_id!r} already belongs to an earlier row with different content; give "
                "every pair a unique id, or none; --ignore id reads them without"
            )
        self._ids.add(id_hash)
        self._pairs.add(pair_hash)
        return ""

    def are_new(self, id_hashes: list[int], pair_hashes: list[int]) -> bool:
        """Whether no pair of many repeats another; if so, they count as seen from now on."""
        for hashes, seen in ((id_hashes, self._ids), (pair_hashes, self._pairs)):
            if len(set(hashes)) < len(hashes) or not seen.isdisjoint(hashes):
                return False
        self._ids.add(*id_hashes)
        self._pairs.add(*pair_hashes)
        return True


def no_pairs(source: str | Path) -> UserError:
    """The refusal of a source without records."""
    return UserError(f"{source} holds no pairs")


def none_left(source: str | Path, drops: Counter[str]) -> str:
    """What to say where every pair of a source was dropped."""
    listed = ", ".join(f"{count} dropped: {reason}" for reason, count in sorted(drops.items()))
    return f"{source}: no pair is left ({listed})"


def conversation_text(messages: tuple[Message, ...]) -> str:
    """A conversation as ``Role: content`` paragraphs, for display and for prompts."""
    return "\n\n".join(
        f"{message.role.capitalize()}: " + "\n".join(part for part in (message.content, message.extra) if part)
        for message in messages
    )


def _content(answered: Answered) -> str:
    parts = [
        part if isinstance(part, str) else [turn.as_list() for turn in part]
        for part in (answered.messages, answered.chosen, answered.rejected)
    ]
    return json.dumps([*parts, *([answered.tools] if answered.tools else [])], ensure_ascii=False)


def _pair(number: int, row: dict, format: PairFormat, reading: Reading, notes: Counter[str]) -> Pair:
    if reading.ignore:
        row = {name: value for name, value in row.items() if name not in reading.ignore}
    answered = format.read(row)
    if not reading.columns:
        answered = with_columns_beside(answered, row, format)
    if unread := unread_columns(row, answered, format):
        names = ", ".join(map(repr, unread))
        raise ValueError(
            f"column {names} would not be used, though it may change what the answers mean; say what it is "
            f"(--columns), or leave it out on purpose: --ignore {' '.join(unread)}"
        )
    _require_sound(answered)
    named = mapped_row(row, reading.columns) if reading.columns else row
    try:
        pair_id = _pair_id(named, notes) or hashlib.sha256(_content(answered).encode()).hexdigest()[:16]
        for text in (pair_id, *_texts_of(answered)):
            text.isascii() or text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "text with half of a surrogate pair (an escape such as \\ud800), which is not a valid character"
        ) from None
    return Pair(
        pair_id,
        answered.messages,
        _shown(answered.chosen),
        _shown(answered.rejected),
        _score(answered.chosen_score, notes),
        _score(answered.rejected_score, notes),
        *_sampled_ids(row, answered),
        tools=answered.tools,
        chosen_turns=() if isinstance(answered.chosen, str) else answered.chosen,
        rejected_turns=() if isinstance(answered.rejected, str) else answered.rejected,
        pair_weight=_weight(named.get("pair_weight", row.get("pair_weight"))),
        row=number,
    )


def _texts_of(answered: Answered) -> Iterator[str]:
    """Every text that a pair's content is made of, but for the roles."""
    yield answered.tools
    for part in (answered.messages, answered.chosen, answered.rejected):
        if isinstance(part, str):
            yield part
        else:
            for turn in part:
                yield turn.content
                yield turn.extra


def _require_sound(answered: Answered) -> None:
    messages = answered.messages
    if not messages or messages[-1].role not in ("user", "tool"):
        raise ValueError("the conversation must end with a user turn")
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("a system message may only come first")
    for message in messages:
        if message.role == "user" and not message.content.strip():
            raise ValueError("a user turn is empty")
        if marker := beginning_of_template(message.content):
            raise ValueError(
                f"the {message.role} turn already carries a chat template ({marker}), which would be applied twice: "
                "give the bare text or a list of messages"
            )
    for name, response in (("chosen", answered.chosen), ("rejected", answered.rejected)):
        turns = response if isinstance(response, tuple) else (Message("assistant", response),)
        if any(not turn.content.strip() and not turn.extra for turn in turns):
            raise ValueError(f"{name} is an empty response")
        if any(turn.role == "system" for turn in turns):
            raise ValueError("a system message may only come first")
    ends = [spelled_end(a if isinstance(a, str) else a[-1].content) for a in (answered.chosen, answered.rejected)]
    if ends[0] and ends[0] == ends[1]:
        raise ValueError(f"both answers end with {ends[0]} spelled out, and the model's own would follow: take it out")


def _shown(answer: Answer) -> str:
    return answer if isinstance(answer, str) else conversation_text(answer)


def _sampled_ids(row: dict, answered: Answered) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None, str | None]:
    names = ("chosen_ids", "rejected_ids", "tokenizer")
    if all(row.get(name) is None for name in names[:2]):
        return None, None, None
    if any(row.get(name) is None for name in names):
        raise ValueError(f"{', '.join(names)} go together: give all three, or none")
    for side, answer in (("chosen", answered.chosen), ("rejected", answered.rejected)):
        if not isinstance(answer, str):
            raise ValueError(
                f"{side} has several turns or calls a tool, and sampled ids are those of one text: take out chosen_ids "
                "and rejected_ids to have it tokenised"
            )
    for name in names[:2]:
        ids = row[name]
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{name} must be a list of token ids, at least one")
    return tuple(row["chosen_ids"]), tuple(row["rejected_ids"]), str(row["tokenizer"])


def _pair_id(row: dict, notes: Counter[str]) -> str | None:
    given = next((row[name] for name in ("pair_id", "id") if row.get(name) is not None), None)
    if isinstance(given, float) and given.is_integer():
        given = int(given)  # pandas stores integers beside missing ones as floats
    if given is not None and (isinstance(given, bool) or not isinstance(given, (str, int)) or given == ""):
        notes[NO_ID] += 1
        return None
    return None if given is None else str(given)


def _score(value: Any, notes: Counter[str]) -> float | None:
    """A score as a finite number, or None; scores are for people, so that none is worth refusing a pair."""
    number = _number(value)
    if number is not None and not math.isfinite(number):
        notes[NO_SCORE] += 1
        return None
    return number


def _weight(value: Any) -> float | None:
    """A weight as a number, or None; weights are for training, so that one that cannot be used is refused."""
    number = _number(value)
    if number is not None and not is_weight(number):
        raise ValueError(f"pair_weight is {str(value)[:60]!r}: it must be a number from 0 to {LARGEST_WEIGHT:g}")
    return number


def is_weight(number: float) -> bool:
    """Whether a number can be the weight of a pair; 0 keeps a pair in the data that is not trained on."""
    return 0 <= number <= LARGEST_WEIGHT


def _number(value: Any) -> float | None:
    """A number, also one written as text; nan for what is none; None for a missing value."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float, str, decimal.Decimal)):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan
