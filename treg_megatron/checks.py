"""Whether a recipe can run on given ranks and data: what can be known before anything heavy is imported."""

from typing import Any

import numpy as np

from treg_megatron.errors import UserError
from treg_megatron.objective import Objective
from treg_megatron.recipe import DataSection, ParallelSection
from treg_megatron.streams import PairStreams


def data_parallel_size(parallel: ParallelSection, ranks: int) -> int:
    """Ranks that are left for data parallelism.

    Raises:
        UserError: tensor times pipeline times context size does not divide the ranks.
    """
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if ranks % model_ranks:
        context = f" x parallel.context={parallel.context}" if parallel.context > 1 else ""
        raise UserError(f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}{context} needs a "
                        f"multiple of {model_ranks} processes, {ranks} were started: "
                        f"torchrun --nproc-per-node {model_ranks}")
    return ranks // model_ranks


def require_split(fields: dict[str, Any], tensor: int, pipeline: int, section: str) -> None:
    """Check that a model can be split into so many parts.

    Args:
        fields: the model's sizes, as ``families.model_fields`` gives them.
        section: the recipe's, whose keys ``tensor`` and ``pipeline`` these are.

    Raises:
        UserError: one of them does not divide it, with the values that would.
    """
    heads, groups = fields["num_attention_heads"], fields["num_query_groups"]
    for name, size in (("attention heads", heads), ("key-value heads", groups), ("ffn_hidden_size", fields["ffn_hidden_size"])):
        if size % tensor:
            fitting = [n for n in range(1, groups + 1) if not (heads % n or groups % n or fields["ffn_hidden_size"] % n)]
            raise UserError(f"{section}.tensor={tensor} does not divide the model's {size} {name}; "
                            f"tensor sizes that do: {', '.join(map(str, fitting))}")
    if fields["num_layers"] % pipeline:
        fitting = [n for n in range(1, fields["num_layers"] + 1) if fields["num_layers"] % n == 0]
        raise UserError(f"{section}.pipeline={pipeline} does not divide the model's {fields['num_layers']} layers; "
                        f"pipeline sizes that do: {', '.join(map(str, fitting))}")


def require_divisible(fields: dict[str, Any], parallel: ParallelSection, data: DataSection, ranks: int) -> None:
    """Check every quantity that a layout splits.

    Args:
        fields: the model's sizes, as ``families.model_fields`` gives them.

    Raises:
        UserError: one that does not divide, with the values that would.
    """
    require_split(fields, parallel.tensor, parallel.pipeline, "parallel")
    if parallel.virtual_pipeline:
        chunks = parallel.pipeline * parallel.virtual_pipeline
        if parallel.pipeline == 1:
            raise UserError("parallel.virtual_pipeline interleaves pipeline stages: it needs parallel.pipeline > 1")
        if fields["num_layers"] % chunks:
            raise UserError(f"parallel.virtual_pipeline={parallel.virtual_pipeline} x parallel.pipeline="
                            f"{parallel.pipeline} does not divide the model's {fields['num_layers']} layers")
        if data.layout != "bins":
            raise UserError(f"parallel.virtual_pipeline needs rows of one length: data.layout=bins, not {data.layout}")
    if parallel.context > 1 and data.layout == "padded":
        raise UserError("parallel.context splits packed sequences: data.layout=packed or bins, not padded")
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence splits the sequence over the tensor-parallel group: it needs parallel.tensor > 1")
    per_pass = data.micro_batch_size * data_parallel_size(parallel, ranks)
    if data.global_batch_size % per_pass:
        raise UserError(f"data.global_batch_size={data.global_batch_size} is no multiple of data.micro_batch_size="
                        f"{data.micro_batch_size} x {per_pass // data.micro_batch_size} data-parallel ranks = {per_pass}")
    if data.seq_length > fields["seq_length"]:
        raise UserError(f"data.seq_length={data.seq_length} is longer than the {fields['seq_length']} positions that the "
                        f"model was trained for")


def require_trainable(streams: PairStreams, data: DataSection, objective: Objective) -> None:
    """Check that every pair of streams fits the recipe, and that they hold what the objective reads.

    Raises:
        UserError: fewer pairs than one global batch, a pair longer than ``data.seq_length``, no reference log-probs.
    """
    if len(streams) < data.global_batch_size and str(streams.prefix) == data.train:
        raise UserError(f"{streams.prefix} has {len(streams)} pairs, fewer than data.global_batch_size="
                        f"{data.global_batch_size}: lower it or add pairs")
    longest = streams.sequence_lengths.max(axis=1)
    too_long = np.flatnonzero(longest > data.seq_length)
    if len(too_long):
        raise UserError(f"{streams.prefix}: {len(too_long)} pairs are longer than data.seq_length={data.seq_length}, the "
                        f"first is {streams.pair_id(int(too_long[0]))} with {longest[too_long[0]]} tokens: raise "
                        f"data.seq_length, or label again with a smaller label.max_length")
    if objective.needs_reference and not streams.manifest["reference_logprobs"]:
        raise UserError(f"{streams.prefix} has no reference log-probs, which objective.preference={objective.preference} "
                        f"needs: label with a reference model, or use simpo or sft")
