"""Weighted blend of aligned datasets, in Megatron's notation: ``0.3 PREFIX_A 0.7 PREFIX_B``.

Weights are shares of the pairs of an epoch. An epoch is long enough for every pair to occur at least once, so datasets
whose weight exceeds their share of the pairs are repeated. Without weights, ``PREFIX_A PREFIX_B``, every pair occurs
exactly once.
"""

from typing import Any

import numpy as np

from treg_megatron.data.aligned import PAIR_WEIGHTS, VALUES, AlignedDataset, PairRecord, named_values, weight_range
from treg_megatron.errors import UserError

_MAX_EPOCH = 100  # longest epoch, as a multiple of all pairs; a longer one is almost certainly a typo in the weights


class BlendedDataset:
    """Blend of datasets, with the reading interface of :class:`~treg_megatron.data.aligned.AlignedDataset`.

    Attributes:
        prefix: the blend as written in the recipe.
        parts: the datasets blended.
        sequence_lengths, response_lengths: int32 [pairs, 2], as in ``AlignedDataset``, repeats included.
        pair_weights: float32 [pairs], 1 for pairs of parts without weights; None if no part has any.

    Raises:
        UserError: the parts were made with different tokenizers, or the weights make an unreasonably long epoch.
    """

    def __init__(self, written: str, parts: list[AlignedDataset], weights: list[float] | None):
        self.prefix, self.parts = written, parts
        for part in parts[1:]:
            if part.manifest["tokenizer"]["sha256"] != parts[0].manifest["tokenizer"]["sha256"]:
                raise UserError(
                    f"aligned datasets {part.prefix} and {parts[0].prefix} were made with different tokenizers"
                )
        counts = _counts([len(part) for part in parts], weights)
        self._part = np.repeat(np.arange(len(parts)), counts)
        self._pair = np.concatenate([np.arange(count) % len(part) for part, count in zip(parts, counts, strict=True)])
        self.sequence_lengths = np.concatenate(
            [p.sequence_lengths[self._pair[self._part == i]] for i, p in enumerate(parts)]
        )
        self.response_lengths = np.concatenate(
            [p.response_lengths[self._pair[self._part == i]] for i, p in enumerate(parts)]
        )
        self.pair_weights = None
        if any(part.pair_weights is not None for part in parts):
            given = [np.ones(len(p), np.float32) if p.pair_weights is None else p.pair_weights for p in parts]
            self.pair_weights = np.concatenate([given[i][self._pair[self._part == i]] for i in range(len(parts))])
        self.manifest: dict[str, Any] = {
            **{name: value for name, value in parts[0].manifest.items() if name not in (PAIR_WEIGHTS, VALUES)},
            "pairs": len(self),
            "tokens": int(self.sequence_lengths.sum()),
            "response_tokens": int(self.response_lengths.sum()),
            "longest_sequence": int(self.sequence_lengths.max()),
            "reference_logprobs": all(part.manifest["reference_logprobs"] for part in parts),
            "files": {},
            "labels": {
                "blend": [
                    {"prefix": str(part.prefix), "pairs": int(count), "manifest": part.manifest}
                    for part, count in zip(parts, counts, strict=True)
                ]
            },
        }
        if values := sorted(set.intersection(*(set(named_values(part.manifest)) for part in parts))):
            self.manifest[VALUES] = values
        if self.pair_weights is not None:
            self.manifest[PAIR_WEIGHTS] = weight_range(self.pair_weights)

    def __len__(self) -> int:
        return len(self._pair)

    def __getitem__(self, pair: int) -> PairRecord:
        if not 0 <= pair < len(self):
            raise IndexError(f"pair {pair} of {len(self)}")
        record = self.parts[self._part[pair]][int(self._pair[pair])]
        if self.pair_weights is not None:
            record = record._replace(pair_weight=float(self.pair_weights[pair]))
        if self.manifest["reference_logprobs"]:
            return record
        return record._replace(chosen_ref_logprobs=None, rejected_ref_logprobs=None)

    def require_unchanged(self) -> None:
        """Check every part with :meth:`AlignedDataset.require_unchanged`.

        Raises:
            UserError: a file of a part does not match its manifest.
        """
        for part in self.parts:
            part.require_unchanged()

    def pair_id(self, pair: int) -> str:
        """Id of a pair, as in the dataset that it comes from."""
        return self.parts[self._part[pair]].pair_id(int(self._pair[pair]))


def parse_blend(written: str) -> tuple[list[str], list[float] | None]:
    """Prefixes and weights of a blend; the weights are None if it has none.

    Raises:
        UserError: numbers and prefixes do not alternate, or a weight is not positive.
    """
    words = written.split()
    numbers = [_number(word) for word in words]
    if all(number is None for number in numbers):
        return words, None
    weights, prefixes = [number for number in numbers[::2] if number is not None], words[1::2]
    if len(words) % 2 or len(weights) < len(prefixes) or any(number is not None for number in numbers[1::2]):
        raise UserError(
            f"{written!r} is not a blend of aligned datasets: write WEIGHT PREFIX WEIGHT PREFIX ..., or prefixes alone"
        )
    if not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"{written!r}: weights must be positive numbers")
    return prefixes, weights


def _counts(pairs: list[int], weights: list[float] | None) -> list[int]:
    if weights is None:
        return pairs
    shares = [weight / sum(weights) for weight in weights]
    epoch = max(count / share for count, share in zip(pairs, shares, strict=True))
    if epoch > _MAX_EPOCH * sum(pairs):
        raise UserError(
            f"with shares {', '.join(f'{share:.2g}' for share in shares)} an epoch that covers every pair "
            f"has {epoch:.3g} pairs, but the datasets have only {sum(pairs)}: give the "
            "larger datasets more weight"
        )
    return [max(count, round(share * epoch)) for count, share in zip(pairs, shares, strict=True)]


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
