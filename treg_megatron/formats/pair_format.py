"""What a preference format is, and what it makes of a record."""

from collections.abc import Callable
from typing import Any, NamedTuple

from treg_megatron.tokenizer.conversation import Message

Answer = str | tuple[Message, ...]


class Answered(NamedTuple):
    """A conversation and two answers to it, the preferred one first, with scores where the record has them.

    An answer is a text, or several turns that begin and end with the assistant's; also one turn that is more than text,
    such as a call of a tool. Scores are as the record has them, not yet checked.
    """

    messages: tuple[Message, ...]
    chosen: Answer
    rejected: Answer
    chosen_score: Any = None
    rejected_score: Any = None
    tools: str = ""


class NoPreference(Exception):
    """A well-formed record without training signal: its answers have equal ranks or scores."""


class PairFormat(NamedTuple):
    """A preference format, declared by the columns of its records.

    ``read`` raises ``ValueError`` for an unusable record, :class:`NoPreference` for one without a preference.

    Attributes:
        name: what ``label.format`` and messages call it.
        keys: description of its columns, for people.
        needs: columns without which a record is of another format.
        read: turns a record into an :class:`Answered`.
        also: further columns that it reads.
        fits: what a record must fulfil beyond having the columns.
        by_name_only: never recognised, only read when asked for by name.
        hub: public datasets in this format.
    """

    name: str
    keys: str
    needs: tuple[str, ...]
    read: Callable[[dict], Answered]
    also: tuple[str, ...] = ()
    fits: Callable[[dict], bool] = lambda row: True
    by_name_only: bool = False
    hub: tuple[str, ...] = ()

    def missing(self, row: dict) -> list[str]:
        """The needed columns that a record lacks."""
        return [name for name in self.needs if row.get(name) is None]

    def matches(self, row: dict) -> bool:
        """Whether a record is of this format."""
        return not self.by_name_only and not self.missing(row) and self.fits(row)

    def uses(self, column: str) -> bool:
        """Whether the format reads a column."""
        return column in self.needs or column in self.also
