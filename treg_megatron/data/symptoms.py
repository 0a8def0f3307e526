"""Symptoms of faulty preference data: contradictions, a bias for length, answers that were cut off."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from treg_megatron.data.pairs import Pair
from treg_megatron.formats.templated import spelled_end

_LENGTH_BIAS = 0.9
_OFTEN = 0.1  # of the answers
_ENOUGH_FOR_A_SHARE = 20  # pairs; fewer say nothing about a share
_LONG_ANSWER = 200  # characters; a shorter one may well end without punctuation
_HASHES = 3  # of the signs
_MID_SENTENCE = re.compile(r"[\w,;]\Z")


class Signs(NamedTuple):
    """What a pair adds to the symptoms, without its texts.

    Hashes are equal in this process and those that it forks: of the prompt, of the preference, and of the preference
    that would contradict it. ``cut_off`` and ``spelled_end`` count answers, the others are flags.
    """

    prompt: int
    preference: int
    reverse: int
    chosen_longer: bool
    scored: bool
    chosen_scored_lower: bool
    cut_off: int
    spelled_end: int


def signs_of(pair: Pair) -> Signs:
    """The signs of a pair."""
    prompt, chosen, rejected = hash((pair.messages, pair.tools)), hash(pair.chosen), hash(pair.rejected)
    scored = pair.chosen_score is not None and pair.rejected_score is not None
    return Signs(
        prompt,
        hash((prompt, chosen, rejected)),
        hash((prompt, rejected, chosen)),
        len(pair.chosen) > len(pair.rejected),
        scored,
        scored and pair.chosen_score < pair.rejected_score,  # type: ignore[operator]
        _is_cut_off(pair.chosen) + _is_cut_off(pair.rejected),
        bool(spelled_end(pair.chosen)) + bool(spelled_end(pair.rejected)),
    )


def _is_cut_off(answer: str) -> bool:
    return len(answer) >= _LONG_ANSWER and _MID_SENTENCE.match(answer, len(answer) - 1) is not None


class Symptoms:
    """Counts over pairs.

    Attributes:
        pairs: number of pairs.
        chosen_longer: pairs whose chosen answer has more characters.
        scored, chosen_scored_lower: pairs.
        cut_off: answers that seem to stop in mid-sentence.
        spelled_end: answers that end with a spelled-out end-of-turn token.
    """

    def __init__(self) -> None:
        self.pairs = self.chosen_longer = self.scored = self.chosen_scored_lower = self.cut_off = self.spelled_end = 0
        self._hashes: list[np.ndarray] = []

    def add(self, signs: Sequence[Signs] | np.ndarray) -> None:
        """Count more pairs: their signs, or the same as int64 [pairs, signs]."""
        if not len(signs):
            return
        table = np.asarray(signs, dtype=np.int64)
        self._hashes.append(table[:, :_HASHES].copy())
        self.pairs += len(table)
        for name, total in zip(Signs._fields[_HASHES:], table[:, _HASHES:].sum(0).tolist(), strict=True):
            setattr(self, name, getattr(self, name) + total)

    @property
    def contradicting(self) -> int:
        """Pairs whose preference an earlier one reverses."""
        if not self.pairs:
            return 0
        _, preference, reverse = np.concatenate(self._hashes).T
        known, first = np.unique(preference, return_index=True)
        place = np.minimum(known.searchsorted(reverse), len(known) - 1)
        return int(((known[place] == reverse) & (first[place] < np.arange(self.pairs))).sum())

    @property
    def longer_share(self) -> float | None:
        """Share of pairs whose chosen answer is the longer one; None where there are too few to tell."""
        return self.chosen_longer / self.pairs if self.pairs >= _ENOUGH_FOR_A_SHARE else None

    @property
    def repeated_prompts(self) -> int:
        """Pairs whose prompt an earlier one has."""
        return self.pairs - len(np.unique(np.concatenate(self._hashes)[:, 0])) if self.pairs else 0

    def warnings(self) -> list[str]:
        """What speaks of a fault, one sentence each."""
        contradicting, longer = self.contradicting, self.longer_share
        warnings = []
        if contradicting:
            warnings.append(f"{contradicting} pairs prefer what another pair with the same prompt rejects")
        if longer is not None and longer >= _LENGTH_BIAS:
            warnings.append(f"chosen is longer than rejected in {longer:.0%} of the pairs: a model may learn length")
        if self.chosen_scored_lower:
            warnings.append(f"chosen has the lower score in {self.chosen_scored_lower} pairs")
        if self.cut_off > 2 * self.pairs * _OFTEN:
            warnings.append(f"{self.cut_off} answers seem to be cut off: they end in mid-sentence")
        if self.spelled_end:
            warnings.append(f"{self.spelled_end} answers end with an end-of-turn token spelled out")
        return warnings
