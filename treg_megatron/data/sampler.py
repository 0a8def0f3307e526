"""Order of the pairs in training, and each rank's share of it.

The order depends only on (seed, epoch), and a rank's share only on (step, layout). A run can thus resume at any step on
any number of data-parallel ranks. Every pair is seen exactly once per epoch: the last global batch of an epoch has the
remaining pairs, some of its micro-batches may be empty, and the loss is the mean over the pairs that it has.
"""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

#: folder of the record: RUN/pairs/rank_00003.jsonl (data-parallel rank 3) has lines {"step": 12, "pairs": ["p7", "p1"]}
RECORD = "pairs"


class MicrobatchOrder:
    """Batch sampler: the pair indices of each micro-batch of one data-parallel rank, step by step.

    Iterating yields ``micro_batches`` lists per step, each with at most ``micro_batch_size`` indices, possibly none.
    """

    def __init__(
        self,
        pairs: int,
        micro_batch_size: int,
        global_batch_size: int,
        rank: int,
        ranks: int,
        *,
        epochs: int = 1,
        first_step: int = 0,
        seed: int | None = None,
    ):
        self.pairs, self.rank, self.ranks, self.seed = pairs, rank, ranks, seed
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.steps_per_epoch = math.ceil(pairs / global_batch_size)
        self.first_step, self.steps = first_step, epochs * self.steps_per_epoch
        self.micro_batches = global_batch_size // (micro_batch_size * ranks)

    def __len__(self) -> int:
        """Micro-batches of the entire run: Lightning counts those before ``first_step`` as fetched."""
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            batch = self.global_batch(step)
            for micro in range(self.micro_batches):
                start = (micro * self.ranks + self.rank) * self.micro_batch_size
                yield batch[start : start + self.micro_batch_size].tolist()

    def global_batch(self, step: int) -> np.ndarray:
        """Indices of all pairs of one step, over all ranks; independent of the layout."""
        epoch, step = divmod(step, self.steps_per_epoch)
        return self._epoch_order(epoch)[step * self.global_batch_size : (step + 1) * self.global_batch_size]

    @functools.lru_cache(maxsize=1)  # noqa: B019 -- an order lives as long as its run
    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.pairs)
        return np.random.default_rng([self.seed, epoch]).permutation(self.pairs)


def recorded_pairs(run: Path) -> dict[int, list[str]]:
    """The pairs that a run trained on (train.record_pairs): their ids by step, over all data-parallel ranks."""
    by_step: dict[int, list[str]] = {}
    for path in sorted((Path(run) / RECORD).glob("rank_*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            by_step.setdefault(record["step"], []).extend(record["pairs"])
    return by_step
