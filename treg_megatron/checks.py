"""Whether a recipe can run on a given number of ranks: the arithmetic, before anything heavy is imported."""

from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.recipe import DataSection, ParallelSection


def data_parallel_size(parallel: ParallelSection, ranks: int) -> int:
    """Ranks that are left for data parallelism.

    Raises:
        UserError: tensor times pipeline size does not divide the ranks.
    """
    model_ranks = parallel.tensor * parallel.pipeline
    if ranks % model_ranks:
        raise UserError(f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline} needs a multiple of "
                        f"{model_ranks} processes, {ranks} were started: torchrun --nproc-per-node {model_ranks}")
    return ranks // model_ranks


def require_divisible(fields: dict[str, Any], parallel: ParallelSection, data: DataSection, ranks: int) -> None:
    """Check every quantity that a layout splits.

    Args:
        fields: the model's sizes, as ``families.model_fields`` gives them.

    Raises:
        UserError: one that does not divide, with the values that would.
    """
    heads, groups = fields["num_attention_heads"], fields["num_query_groups"]
    for name, size in (("attention heads", heads), ("key-value heads", groups), ("ffn_hidden_size", fields["ffn_hidden_size"])):
        if size % parallel.tensor:
            fitting = [n for n in range(1, groups + 1) if not (heads % n or groups % n or fields["ffn_hidden_size"] % n)]
            raise UserError(f"parallel.tensor={parallel.tensor} does not divide the model's {size} {name}; "
                            f"tensor sizes that do: {', '.join(map(str, fitting))}")
    if fields["num_layers"] % parallel.pipeline:
        fitting = [n for n in range(1, fields["num_layers"] + 1) if fields["num_layers"] % n == 0]
        raise UserError(f"parallel.pipeline={parallel.pipeline} does not divide the model's {fields['num_layers']} layers; "
                        f"pipeline sizes that do: {', '.join(map(str, fitting))}")
    if parallel.sequence and parallel.tensor == 1:
        raise UserError("parallel.sequence splits the sequence over the tensor-parallel group: it needs parallel.tensor > 1")
    per_pass = data.micro_batch_size * data_parallel_size(parallel, ranks)
    if data.global_batch_size % per_pass:
        raise UserError(f"data.global_batch_size={data.global_batch_size} is no multiple of data.micro_batch_size="
                        f"{data.micro_batch_size} x {per_pass // data.micro_batch_size} data-parallel ranks = {per_pass}")
    if data.seq_length > fields["seq_length"]:
        raise UserError(f"data.seq_length={data.seq_length} is longer than the {fields['seq_length']} positions that the "
                        f"model was trained for")
