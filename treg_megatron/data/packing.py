"""Bin packing of pairs into micro-batches of similar token counts, by first-fit decreasing.

A global batch still has ``global_batch_size`` pairs. They are never split, and packed into bins of ``bin_size`` tokens:
longest first, each pair goes into the first bin with enough space (first-fit decreasing). The bins are distributed
round-robin over data-parallel ranks. The bins of a step thus depend only on the seed and the lengths, and a run can
resume at any step on any number of ranks, as without bins. Megatron's schedule uses one number of micro-batches for the
entire run, that of the step with the most bins. In other steps the remaining micro-batches are empty and contribute
nothing, because the loss is divided by pairs, not by micro-batches.
"""

import math
from collections.abc import Iterator

import numpy as np

from treg_megatron.data.sampler import MicrobatchOrder
from treg_megatron.errors import UserError


def pack(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Pack items into bins of ``size`` by first-fit decreasing; ties keep their order, so the result is deterministic.

    Args:
        lengths: int64 [items], tokens of each item.
        size: capacity of a bin in tokens.

    Returns:
        Indices of the items of each bin, longest first.

    Raises:
        ValueError: an item is longer than a bin.
    """
    if len(lengths) and lengths.max() > size:
        raise ValueError(f"an item of {lengths.max()} does not fit into a bin of {size}")
    bins: list[list[int]] = []
    space = np.zeros(len(lengths), dtype=np.int64)
    for item in np.argsort(-lengths, kind="stable").tolist():
        fitting = space[: len(bins)] >= lengths[item]
        if fitting.any():
            chosen = int(fitting.argmax())
        else:
            chosen = len(bins)
            bins.append([])
            space[chosen] = size
        bins[chosen].append(item)
        space[chosen] -= lengths[item]
    return bins


class BinOrder:
    """Deterministic, resumable batch sampler that yields the bins of one data-parallel rank.

    Iterating yields ``micro_batches`` lists of pair indices per step, each possibly empty and of at most ``bin_size``
    tokens in total.

    Args:
        lengths: int64 [pairs], tokens of each pair (:func:`pair_lengths`).
        rank, ranks: data-parallel rank and size.
        micro_batches: micro-batches per step and rank (:func:`micro_batches` of :func:`most_bins`).
        seed: shuffling seed; None keeps the order of the dataset.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        bin_size: int,
        global_batch_size: int,
        rank: int,
        ranks: int,
        *,
        micro_batches: int,
        epochs: int = 1,
        first_step: int = 0,
        seed: int | None = None,
    ):
        self.lengths, self.bin_size, self.rank, self.ranks = lengths, bin_size, rank, ranks
        self.micro_batches = micro_batches
        self._pairs = MicrobatchOrder(
            len(lengths), 1, global_batch_size, 0, 1, epochs=epochs, first_step=first_step, seed=seed
        )
        self.first_step, self.steps = first_step, self._pairs.steps

    def __len__(self) -> int:
        """Micro-batches of the entire run: Lightning counts those before ``first_step`` as already fetched."""
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            bins = self.bins(step)
            for micro in range(self.micro_batches):
                index = micro * self.ranks + self.rank
                yield bins[index] if index < len(bins) else []

    def bins(self, step: int) -> list[list[int]]:
        """Pair indices of each bin of one step, over all ranks; independent of the parallel layout."""
        batch = self._pairs.global_batch(step)
        return [batch[bin].tolist() for bin in pack(self.lengths[batch], self.bin_size)]


def pair_lengths(sequence_lengths: np.ndarray, bin_size: int, name: str) -> np.ndarray:
    """Tokens per pair, int64 [pairs], from the lengths of its two sequences, int32 [pairs, 2].

    Raises:
        UserError: a pair of the aligned dataset ``name`` does not fit into a bin.
    """
    lengths = sequence_lengths.sum(axis=1, dtype=np.int64)
    if lengths.max() > bin_size:
        raise UserError(
            f"{name}: pair {int(lengths.argmax())} has {lengths.max()} tokens in both sequences, more than "
            f"data.bin_size={bin_size}: raise it to at least that"
        )
    return lengths


def most_bins(
    lengths: np.ndarray, bin_size: int, global_batch_size: int, epochs: int = 1, seed: int | None = None
) -> int:
    """Largest number of bins of any step, over all epochs."""
    order = BinOrder(lengths, bin_size, global_batch_size, 0, 1, micro_batches=1, epochs=epochs, seed=seed)
    return max(len(order.bins(step)) for step in range(order.steps))


def micro_batches(bins: int, ranks: int, group: int = 1) -> int:
    """Micro-batches per rank and step that hold ``bins`` bins over all ranks, rounded up to a multiple of ``group``."""
    return math.ceil(bins / (ranks * group)) * group
