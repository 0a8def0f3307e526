"""Several streams read as one, in the proportions that Megatron users write: ``0.3 PREFIX_A 0.7 PREFIX_B``.

Weights are shares of the pairs of an epoch. An epoch is as long as it takes for every pair to come at least once, so
nothing is left out: streams with more weight than pairs are gone through several times. Without weights,
``PREFIX_A PREFIX_B``, every pair comes exactly once.
"""

from typing import Any

import numpy as np

from treg_megatron.data.aligned import PairRecord, PairStreams
from treg_megatron.errors import UserError

_LONGEST = 100  # times the pairs that there are; more is a slip of the pen in the weights


class BlendedStreams:
    """Read like :class:`~treg_megatron.data.aligned.PairStreams`; ``prefix`` is the blend as it was written."""

    def __init__(self, written: str, parts: list[PairStreams], weights: list[float] | None):
        self.prefix, self.parts = written, parts
        for part in parts[1:]:
            if part.manifest["tokenizer"]["sha256"] != parts[0].manifest["tokenizer"]["sha256"]:
                raise UserError(f"streams {part.prefix} and {parts[0].prefix} were made with different tokenizers")
        counts = _counts([len(part) for part in parts], weights)
        self._part = np.repeat(np.arange(len(parts)), counts)
        self._pair = np.concatenate([np.arange(count) % len(part) for part, count in zip(parts, counts)])
        self.sequence_lengths = np.concatenate(
            [p.sequence_lengths[self._pair[self._part == i]] for i, p in enumerate(parts)]
        )
        self.response_lengths = np.concatenate(
            [p.response_lengths[self._pair[self._part == i]] for i, p in enumerate(parts)]
        )
        self.manifest: dict[str, Any] = {
            **parts[0].manifest,
            "pairs": len(self),
            "tokens": int(self.sequence_lengths.sum()),
            "response_tokens": int(self.response_lengths.sum()),
            "longest_sequence": int(self.sequence_lengths.max()),
            "reference_logprobs": all(part.manifest["reference_logprobs"] for part in parts),
            "files": {},
            "labels": {
                "blend": [
                    {"prefix": str(part.prefix), "pairs": int(count), "manifest": part.manifest}
                    for part, count in zip(parts, counts)
                ]
            },
        }

    def __len__(self) -> int:
        return len(self._pair)

    def __getitem__(self, pair: int) -> PairRecord:
        if not 0 <= pair < len(self):
            raise IndexError(f"pair {pair} of {len(self)}")
        record = self.parts[self._part[pair]][int(self._pair[pair])]
        if self.manifest["reference_logprobs"]:
            return record
        return record._replace(chosen_ref_logprobs=None, rejected_ref_logprobs=None)

    def require_unchanged(self) -> None:
        """:meth:`PairStreams.require_unchanged` of every part."""
        for part in self.parts:
            part.require_unchanged()

    def pair_id(self, pair: int) -> str:
        """The name of a pair in the streams that it comes from."""
        return self.parts[self._part[pair]].pair_id(int(self._pair[pair]))


def parse_blend(written: str) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a blend.

    Raises:
        UserError: numbers and prefixes do not alternate, or a weight is not positive.
    """
    words = written.split()
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return words, None
    weights, prefixes = numbers[::2], words[1::2]
    if len(words) % 2 or None in weights or any(number is not None for number in numbers[1::2]):
        raise UserError(f"{written!r} is no blend of streams: write WEIGHT PREFIX WEIGHT PREFIX ..., or prefixes alone")
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"{written!r}: weights must be positive numbers")
    return prefixes, weights


def _counts(pairs: list[int], weights: list[float] | None) -> list[int]:
    if weights is None:
        return pairs
    shares = [weight / sum(weights) for weight in weights]
    epoch = max(count / share for count, share in zip(pairs, shares))
    if epoch > _LONGEST * sum(pairs):
        raise UserError(
            f"with shares {', '.join(f'{share:.2g}' for share in shares)} an epoch that leaves no pair out "
            f"has {epoch:.3g} pairs where the streams have {sum(pairs)}: give the "
            "larger streams more weight"
        )
    return [max(count, round(share * epoch)) for count, share in zip(pairs, shares)]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
