"""Micro-batches, pipeline bubble and arithmetic of a training step, by formula: nothing is built."""

from typing import Any

from treg_megatron.config.schema import DataSection, LoraSection, ParallelSection, TrainSection
from treg_megatron.data import packing
from treg_megatron.preflight import costs

#: length of an ordinary pair as a share of the longest; an assumption (UltraFeedback has about 1,200 tokens in both
#: sequences together, of 4,096)
TYPICAL_FILL = 1 / 3


def micro_batches(parallel: ParallelSection, data: DataSection, data_ranks: int, fill: float = 1.0) -> int:
    """Micro-batches per data-parallel rank and step.

    The interleaved schedule takes groups of one per stage, and fills the last group with empty ones.

    Args:
        fill: length of the pairs as a share of the longest; as many pairs as fit share a bin.
    """
    if data.layout != "bins":
        return data.global_batch_size // (data.micro_batch_size * data_ranks)
    bins = round(data.global_batch_size * fill)
    return packing.micro_batches(bins, data_ranks, parallel.pipeline if parallel.virtual_pipeline else 1)


def bubble(parallel: ParallelSection, data: DataSection, data_ranks: int, fill: float = 1.0) -> float:
    """Share of a step in which a stage has nothing to do: it waits for the pipeline to fill and to drain (arXiv
    2104.04473, section 2.2), or runs an empty micro-batch.

    Args:
        fill: see :func:`micro_batches`.
    """
    slots = micro_batches(parallel, data, data_ranks, fill)
    busy = round(data.global_batch_size * fill) / data_ranks if data.layout == "bins" else slots
    waiting = (parallel.pipeline - 1) / (parallel.virtual_pipeline or 1)
    return 1 - busy / ((slots if parallel.virtual_pipeline else busy) + waiting)


def flops(fields: dict[str, Any], data: DataSection, lora: LoraSection, train: TrainSection) -> float:
    """FLOPs of a step, those of recompute included."""
    return costs.step_flops(fields, data, lora.rank is not None, train.recompute == "full")
