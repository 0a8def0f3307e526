"""Which pair is trained on when: order, shares of the ranks, resume.

The order is a function of (seed, epoch) alone and the share of a rank one of (step, layout), so a run resumes at any
step, on any number of data-parallel ranks, by knowing its step. Every pair is seen exactly once an epoch: the last
global batch of an epoch holds what is left, some of its micro-batches may be empty, and the loss stays the mean over
the pairs that are there.
"""

import functools
import math
from collections.abc import Iterator

import lightning.pytorch as pl
import numpy as np
from megatron.core import parallel_state
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, Dataset

from treg_megatron.errors import UserError
from treg_megatron.microbatch import collate
from treg_megatron.recipe import DataSection
from treg_megatron.streams import PairRecord, PairStreams, open_streams


class PairDataset(Dataset):
    """Opened streams as a map-style dataset of pairs."""

    def __init__(self, streams: PairStreams):
        self.streams = streams

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, index: int) -> PairRecord:
        return self.streams[index]


class MicrobatchOrder:
    """Batch sampler: the indices of each micro-batch of one data-parallel rank, step after step.

    Iterating yields ``micro_batches`` lists a step, each of at most ``micro_batch_size`` indices, possibly none.
    """

    def __init__(self, pairs: int, micro_batch_size: int, global_batch_size: int, rank: int, ranks: int, *,
                 epochs: int = 1, first_step: int = 0, seed: int | None = None):
        self.pairs, self.rank, self.ranks, self.seed = pairs, rank, ranks, seed
        self.micro_batch_size, self.global_batch_size = micro_batch_size, global_batch_size
        self.steps_per_epoch = math.ceil(pairs / global_batch_size)
        self.first_step, self.steps = first_step, epochs * self.steps_per_epoch
        self.micro_batches = global_batch_size // (micro_batch_size * ranks)

    def __len__(self) -> int:
        """Micro-batches of the whole run: Lightning counts those before ``first_step`` as fetched."""
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.steps):
            batch = self.global_batch(step)
            for micro in range(self.micro_batches):
                start = (micro * self.ranks + self.rank) * self.micro_batch_size
                yield batch[start:start + self.micro_batch_size].tolist()

    def global_batch(self, step: int) -> np.ndarray:
        """Indices of all pairs of one step, over all ranks: the same for every layout."""
        epoch, step = divmod(step, self.steps_per_epoch)
        return self._epoch_order(epoch)[step * self.global_batch_size:(step + 1) * self.global_batch_size]

    @functools.lru_cache(maxsize=1)  # noqa: B019 -- an order lives as long as its run
    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self.seed is None:
            return np.arange(self.pairs)
        return np.random.default_rng([self.seed, epoch]).permutation(self.pairs)


class PairSampler(MegatronDataSampler):
    """Tells NeMo the shape of a step: a micro-batch is some pairs, which lie in one row or in two rows each."""

    def __init__(self, data: DataSection):
        super().__init__(seq_len=data.seq_length, micro_batch_size=data.micro_batch_size,
                         global_batch_size=data.global_batch_size, dataloader_type="single", output_log=False)

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """The loaders of :class:`PairData` are already split over ranks."""
        return dataloader


class PairData(pl.LightningDataModule):
    """Training and validation pairs from aligned streams.

    Args:
        data: the recipe's section.
        divisor: what a micro-batch's length must be divisible by (the tensor-parallel size under sequence parallelism).

    Raises:
        UserError: fewer pairs than one global batch, a sequence longer than ``seq_length``.
    """

    def __init__(self, data: DataSection, divisor: int = 1):
        super().__init__()
        self.data = data
        self.pad_to = math.lcm(data.pad_to_multiple_of, divisor)
        self.train = _open(data.train, data.seq_length)
        self.validation = _open(data.validation, data.seq_length) if data.validation else None
        if len(self.train) < data.global_batch_size:
            raise UserError(f"{data.train} has {len(self.train)} pairs, fewer than data.global_batch_size="
                            f"{data.global_batch_size}: lower it or add pairs")
        self.data_sampler = PairSampler(data)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train) / self.data.global_batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps_per_epoch * self.data.epochs

    def train_dataloader(self) -> DataLoader:
        """Starts at the trainer's step, which a resumed run has restored by the time that this is called."""
        return self._loader(self.train, epochs=self.data.epochs, first_step=self.trainer.global_step,
                            seed=self.data.seed)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.validation)

    def _loader(self, streams: PairStreams, **order) -> DataLoader:
        order = MicrobatchOrder(len(streams), self.data.micro_batch_size, self.data.global_batch_size,
                                parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size(),
                                **order)
        return DataLoader(PairDataset(streams), batch_sampler=order, collate_fn=functools.partial(
            collate, layout=self.data.layout, pad_to_multiple_of=self.pad_to))


def _open(prefix: str, seq_length: int) -> PairStreams:
    streams = open_streams(prefix)
    longest = streams.sequence_lengths.max(axis=1)
    too_long = np.flatnonzero(longest > seq_length)
    if len(too_long):
        raise UserError(f"{prefix}: {len(too_long)} pairs are longer than data.seq_length={seq_length}, the first is "
                        f"{streams[int(too_long[0])].pair_id} with {longest[too_long[0]]} tokens: raise "
                        f"data.seq_length, or label again with a smaller label.max_length")
    return streams
