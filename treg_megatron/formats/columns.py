"""Flat datasets of any other columns: the user says which column is what."""

from collections.abc import Mapping
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.formats import beside
from treg_megatron.formats.fields import SIDES, best_and_worst, prompt, required, text
from treg_megatron.formats.pair_format import Answered, PairFormat
from treg_megatron.formats.trl import explicit

_ANSWERS = ("responses", "scores")
_OPTIONAL = ("system", "history", "tools", "id", "chosen_score", "rejected_score", "pair_weight")
_READS_NOTHING = PairFormat("columns", "", (), explicit)  # a mapped record has all columns beside under their own names
FIELDS = ("prompt", *SIDES, *_ANSWERS, *_OPTIONAL)


class ColumnsFormat:
    """A format made of the user's own column names.

    Args:
        columns: the column of each field of :data:`FIELDS`; a dot leads into an object (``input.messages``). Either
            ``chosen`` and ``rejected`` are named, or ``responses`` and ``scores``, two lists of the same length.

    Raises:
        UserError: a field is not known, or one that is needed has no column.
    """

    def __init__(self, columns: Mapping[str, str]):
        for field in columns:
            if field not in FIELDS:
                raise UserError(f"label.columns names {field!r}, which is none of {', '.join(FIELDS)}")
        needed = ("prompt", *(_ANSWERS if "responses" in columns else SIDES))
        if absent := [field for field in needed if field not in columns]:
            raise UserError(
                f"label.columns names no column for {', '.join(absent)}; give prompt=COLUMN chosen=COLUMN "
                "rejected=COLUMN, or prompt=COLUMN responses=COLUMN scores=COLUMN"
            )
        self.columns = dict(columns)
        self.format = PairFormat(
            "columns",
            ", ".join(f"{field}={column}" for field, column in columns.items()),
            tuple(dict.fromkeys(columns[field].partition(".")[0] for field in needed)),
            self._read,
            also=tuple(column.partition(".")[0] for column in columns.values()),
        )

    def _read(self, row: dict) -> Answered:
        mapped = mapped_row(row, self.columns)
        if "responses" in self.columns:
            answered = self._best_and_worst(mapped)
        else:
            for side in SIDES:
                self._required(mapped, side)
            self._required(mapped, "prompt")
            answered = explicit(mapped)
        return beside.with_columns_beside(answered, mapped, _READS_NOTHING)

    def _required(self, mapped: dict, field: str) -> Any:
        if mapped.get(field) is None:
            raise ValueError(f"column {self.columns[field]!r}, named as {field}, is missing")
        return mapped[field]

    def _best_and_worst(self, mapped: dict) -> Answered:
        responses, scores = (self._required(mapped, field) for field in _ANSWERS)
        if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores):
            raise ValueError(f"{' and '.join(self.columns[f] for f in _ANSWERS)} must be lists of the same length")
        best, worst = best_and_worst(scores, self.columns["scores"])
        answers = [text(responses[i], self.columns["responses"]) for i in (best, worst)]
        return Answered(prompt(required(mapped, "prompt")), *answers, scores[best], scores[worst])


def mapped_row(row: dict, columns: Mapping[str, str]) -> dict:
    """A record under the names of :data:`FIELDS`."""
    return {field: _at(row, column) for field, column in columns.items()}


def _at(row: dict, column: str) -> Any:
    if column in row:
        return row[column]
    value: Any = row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value
