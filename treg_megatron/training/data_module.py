"""The Lightning data module: turns an aligned dataset into this rank's micro-batches."""

import functools
import math

import lightning.pytorch as pl
import numpy as np
from megatron.core import parallel_state
from nemo.lightning.megatron_parallel import MegatronStep
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from nemo.utils import AppState
from torch.utils.data import DataLoader, Dataset

from treg_megatron.config.schema import DataSection, ParallelSection
from treg_megatron.data import packing
from treg_megatron.data.aligned import AlignedDataset, PairRecord
from treg_megatron.data.collate import collate, row_multiple
from treg_megatron.data.sampler import MicrobatchOrder
from treg_megatron.distributed.context_parallel import ContextPart
from treg_megatron.distributed.layout import rows_of_one_length
from treg_megatron.distributed.stage_shapes import with_known_shapes


class PairDataset(Dataset):
    """An opened aligned dataset as a map-style dataset of pairs."""

    def __init__(self, streams: AlignedDataset):
        self.streams = streams

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, index: int) -> PairRecord:
        return self.streams[index]


class PairSampler(MegatronDataSampler):
    """Tells NeMo the shape of a step: a micro-batch is a number of pairs, packed together or as two rows per pair.

    Args:
        data: the recipe's section.
        bins: for the layout ``bins``, the largest number of bins in a step; NeMo then counts bins as samples.
        bin_size: tokens per bin, or None for the other layouts. The interleaved schedule exchanges tensors of exactly
            this length between pipeline stages; in the 1F1B schedule each stage takes the length from the row.
        group: the number of micro-batches per step is a multiple of this; the remaining ones are empty.
    """

    def __init__(self, data: DataSection, bins: int | None = None, bin_size: int | None = None, group: int = 1):
        super().__init__(
            seq_len=bin_size or data.seq_length,
            micro_batch_size=data.micro_batch_size if bins is None else 1,
            global_batch_size=data.global_batch_size,
            dataloader_type="single",
            output_log=False,
        )
        self.bins, self.group = bins, group

    def setup(self, global_rank: int) -> None:
        if self.bins is not None:
            ranks = AppState().data_parallel_size
            self.global_batch_size = packing.micro_batches(self.bins, ranks, self.group) * ranks
        super().setup(global_rank)

    def on_megatron_step_start(self, step: MegatronStep) -> MegatronStep:
        step = super().on_megatron_step_start(step)
        step.forward_backward_func = with_known_shapes(step.forward_backward_func)
        return step

    def transform_dataloader(self, dataloader: DataLoader, consumed_samples: int = 0) -> DataLoader:
        """The loaders of :class:`PairData` are already split over ranks."""
        return dataloader


class PairData(pl.LightningDataModule):
    """Training and validation pairs from aligned datasets.

    Args:
        data: the recipe's section.
        train: the training dataset, opened and validated.
        validation: the validation dataset, opened and validated, or None.
        parallel: the recipe's section.
        token_order: whether the objective reads the position and the rank of a token in its response.
    """

    def __init__(
        self,
        data: DataSection,
        train: AlignedDataset,
        validation: AlignedDataset | None,
        parallel: ParallelSection,
        token_order: bool = False,
    ):
        super().__init__()
        self.data, self.train, self.validation, self.token_order = data, train, validation, token_order
        self.pad_to = row_multiple(data, parallel)
        self.padded_length = ContextPart(0, parallel.context).padded
        self.bins = self.bin_size = None
        self.group = 1
        if data.layout == "bins":
            self.bin_size = data.tokens_of_a_bin
            if rows_of_one_length(parallel):
                self.pad_to = self.bin_size = math.ceil(self.bin_size / self.pad_to) * self.pad_to
            if parallel.virtual_pipeline:
                self.group = parallel.pipeline  # the interleaved schedule runs them in groups of one per stage
            held_out = (
                []
                if validation is None
                else [packing.most_bins(self._lengths(validation), self.bin_size, data.global_batch_size)]
            )
            self.bins = max(
                packing.most_bins(self._lengths(train), self.bin_size, data.global_batch_size, data.epochs, data.seed),
                *held_out,
                1,
            )
        self.data_sampler = PairSampler(data, self.bins, self.bin_size, self.group)

    def pairs_per_micro_batch(self, ranks: int) -> float:
        """Mean number of pairs per micro-batch of a full step on ``ranks`` data-parallel ranks."""
        if self.bins is None:
            return self.data.micro_batch_size
        return self.data.global_batch_size / (packing.micro_batches(self.bins, ranks, self.group) * ranks)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.train) / self.data.global_batch_size)

    @property
    def steps(self) -> int:
        """Optimizer steps of the entire run."""
        return self.steps_per_epoch * self.data.epochs

    def train_dataloader(self) -> DataLoader:
        """Training micro-batches from the trainer's current step, which a resumed run has restored by then."""
        return self._loader(
            self.train, epochs=self.data.epochs, first_step=self.trainer.global_step, seed=self.data.seed
        )

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.validation)

    def _loader(self, streams: AlignedDataset, **order) -> DataLoader:
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        if self.bins is None:
            layout = self.data.layout
            sampler = MicrobatchOrder(
                len(streams), self.data.micro_batch_size, self.data.global_batch_size, rank, ranks, **order
            )
        else:
            layout = "packed"
            sampler = packing.BinOrder(
                self._lengths(streams),
                self.bin_size,
                self.data.global_batch_size,
                rank,
                ranks,
                micro_batches=packing.micro_batches(self.bins, ranks, self.group),
                **order,
            )
        return DataLoader(
            PairDataset(streams),
            batch_sampler=sampler,
            collate_fn=functools.partial(
                collate,
                layout=layout,
                pad_to_multiple_of=self.pad_to,
                context=ContextPart(
                    parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
                ),
                share_prompts=self.data.share_prompts,
                token_order=self.token_order,
                weighted=streams.pair_weights is not None,
            ),
        )

    def _lengths(self, streams: AlignedDataset) -> np.ndarray:
        lengths = self.padded_length(streams.sequence_lengths)
        if self.data.share_prompts:  # the rejected sequence adds only its response
            lengths = np.column_stack([lengths[:, 0], streams.response_lengths[:, 1]])
        return packing.pair_lengths(lengths, self.bin_size, str(streams.prefix))
