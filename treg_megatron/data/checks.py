"""Validation of an aligned dataset against the recipe."""

import numpy as np

from treg_megatron.config.schema import DataSection
from treg_megatron.data.aligned import AlignedDataset
from treg_megatron.errors import UserError
from treg_megatron.objective import Objective


def require_enough(pairs: int, data: DataSection, where: str) -> None:
    """Check that there is at least one global batch.

    Raises:
        UserError: there are fewer pairs than ``data.global_batch_size``.
    """
    if pairs < data.global_batch_size:
        raise UserError(
            f"{where} has {pairs} pairs, fewer than data.global_batch_size={data.global_batch_size}: lower it "
            "or add pairs"
        )


def require_trainable(streams: AlignedDataset, data: DataSection, objective: Objective) -> None:
    """Check that every pair fits the recipe, and that the dataset holds what the objective reads.

    Raises:
        UserError: fewer training pairs than one global batch, a pair longer than ``data.seq_length``, no reference
            log-probs for an objective that needs them, or no pair with a weight above 0.
    """
    if str(streams.prefix) == data.train:
        require_enough(len(streams), data, str(streams.prefix))
    longest = streams.sequence_lengths.max(axis=1)
    too_long = np.flatnonzero(longest > data.seq_length)
    if len(too_long):
        raise UserError(
            f"{streams.prefix}: {len(too_long)} pairs are longer than data.seq_length={data.seq_length}, the "
            f"first is {streams.pair_id(int(too_long[0]))} with {longest[too_long[0]]} tokens: raise "
            f"data.seq_length, or label again with a smaller label.max_length"
        )
    if objective.needs_reference and not streams.manifest["reference_logprobs"]:
        raise UserError(
            f"{streams.prefix} has no reference log-probs, which objective.loss_type={objective.loss_type} "
            f"needs: label with a reference model, or use simpo or sft"
        )
    if streams.pair_weights is not None and not streams.pair_weights.any():
        raise UserError(f"{streams.prefix}: the weight of every pair is 0, so that nothing would be trained on")
