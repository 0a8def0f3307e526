"""The Lightning data module: aligned streams to this rank's micro-batches."""

import functools
import math

import lightning.pytorch as pl
from megatron.core import parallel_state
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from torch.utils.data import DataLoader, Dataset

from treg_megatron.microbatch import collate
from treg_megatron.order import MicrobatchOrder
from treg_megatron.recipe import DataSection
from treg_megatron.streams import PairRecord, PairStreams


class PairDataset(Dataset):
    """Opened streams as a map-style dataset of pairs."""

    def __init__(self, streams: PairStreams):
        self.streams = streams

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, index: int) -> PairRecord:
        return self.streams[index]


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
        train, validation: its streams, opened and checked; validation may be None.
        divisor: what a micro-batch's length must be divisible by (the tensor-parallel size under sequence parallelism).
    """

    def __init__(self, data: DataSection, train: PairStreams, validation: PairStreams | None, divisor: int = 1):
        super().__init__()
        self.data, self.train, self.validation = data, train, validation
        self.pad_to = math.lcm(data.pad_to_multiple_of, divisor)
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
