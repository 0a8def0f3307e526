"""Symptoms of faulty preference data: contradictions, a bias for length, answers that were cut off."""

import re
from collections import Counter

from treg_megatron.data.pairs import Pair
from treg_megatron.formats.templated import spelled_end

_LENGTH_BIAS = 0.9
_OFTEN = 0.1  # of the answers
_ENOUGH_FOR_A_SHARE = 20  # pairs; fewer say nothing about a share
_LONG_ANSWER = 200  # characters; a shorter one may well end without punctuation
_MID_SENTENCE = re.compile(r"[\w,;]\Z")


class Symptoms:
    """Counts over pairs.

    Attributes:
        pairs: number of pairs.
        counts: ``scored`` and ``chosen_scored_lower`` (pairs), ``contradicting`` (pairs whose preference an earlier one
            reverses), ``chosen_longer`` (pairs, by characters), ``cut_off`` (answers that seem to stop in
            mid-sentence), ``spelled_end`` (answers that end with a spelled-out end-of-turn token).
    """

    def __init__(self) -> None:
        self.pairs = 0
        self.counts: Counter[str] = Counter()
        self._preferences: set[tuple[int, int, int]] = set()

    def add(self, pair: Pair) -> None:
        """Count one more pair."""
        self.pairs += 1
        prompt, chosen, rejected = hash((pair.messages, pair.tools)), hash(pair.chosen), hash(pair.rejected)
        self.counts["contradicting"] += (prompt, rejected, chosen) in self._preferences
        self._preferences.add((prompt, chosen, rejected))
        self.counts["chosen_longer"] += len(pair.chosen) > len(pair.rejected)
        if pair.chosen_score is not None and pair.rejected_score is not None:
            self.counts["scored"] += 1
            self.counts["chosen_scored_lower"] += pair.chosen_score < pair.rejected_score
        for answer in (pair.chosen, pair.rejected):
            self.counts["cut_off"] += (
                len(answer) >= _LONG_ANSWER and _MID_SENTENCE.match(answer, len(answer) - 1) is not None
            )
            self.counts["spelled_end"] += bool(spelled_end(answer))

    @property
    def longer_share(self) -> float | None:
        """Share of pairs whose chosen answer is the longer one; None where there are too few to tell."""
        return self.counts["chosen_longer"] / self.pairs if self.pairs >= _ENOUGH_FOR_A_SHARE else None

    @property
    def repeated_prompts(self) -> int:
        """Pairs whose prompt an earlier one has."""
        return self.pairs - len({prompt for prompt, _, _ in self._preferences})

    def warnings(self) -> list[str]:
        """What speaks of a fault, one sentence each."""
        counts, longer = self.counts, self.longer_share
        warnings = []
        if counts["contradicting"]:
            warnings.append(f"{counts['contradicting']} pairs prefer what another pair with the same prompt rejects")
        if longer is not None and longer >= _LENGTH_BIAS:
            warnings.append(f"chosen is longer than rejected in {longer:.0%} of the pairs: a model may learn length")
        if counts["chosen_scored_lower"]:
            warnings.append(f"chosen has the lower score in {counts['chosen_scored_lower']} pairs")
        if counts["cut_off"] > 2 * self.pairs * _OFTEN:
            warnings.append(f"{counts['cut_off']} answers seem to be cut off: they end in mid-sentence")
        if counts["spelled_end"]:
            warnings.append(f"{counts['spelled_end']} answers end with an end-of-turn token spelled out")
        return warnings
