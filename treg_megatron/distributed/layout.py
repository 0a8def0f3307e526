"""Whether a parallel layout fits a model, its data and the ranks: known before anything heavy is imported."""

from typing import Any

from treg_megatron.config.schema import DataSection, ParallelSection
from treg_megatron.errors import UserError


def data_parallel_size(parallel: ParallelSection, ranks: int) -> int:
    """Ranks that are left for data parallelism.

    Raises:
        UserError: tensor times pipeline times context size does not divide the ranks.
    """
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    if ranks % model_ranks:
        context = f" x parallel.context={parallel.context}" if parallel.context > 1 else ""
        raise UserError(
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}{context} needs a "
            f"multiple of {model_ranks} processes, {ranks} were started: "
            f"torchrun --nproc-per-node {model_ranks}"
        )
    return ranks // model_ranks


def require_layout(fields: dict[str, Any], parallel: ParallelSection, data: DataSection, ranks: int) -> None:
    """Everything that a layout must satisfy: what training asks first, and preflight without the cluster.

    Args:
        fields: the model's sizes, as ``families.model_fields`` gives them.

    Raises:
        UserError: the first thing that cannot work, with what would.
    """
    require_batch(data)
    data_parallel_size(parallel, ranks)
    require_divisible(fields, parallel, data, ranks)
    require_experts_divide(fields, parallel, ranks)


def can_share_prompts(fields: dict[str, Any], parallel: ParallelSection, data: DataSection) -> bool:
    """Whether the layout allows ``data.share_prompts``; the stack has a say, too (``build.shares_prompts``)."""
    return data.layout != "padded" and parallel.context == 1 and not fields.get("num_moe_experts")


def require_split(fields: dict[str, Any], tensor: int, pipeline: int, section: str) -> None:
    """Check that a model can be split into so many parts.

    Args:
        fields: the model's sizes, as ``families.model_fields`` gives them.
        section: the recipe's, whose keys ``tensor`` and ``pipeline`` these are.

    Raises:
        UserError: one of them does not divide it, with the values that would.
    """
    heads, groups = fields["num_attention_heads"], fields["num_query_groups"]
    for name, size in (
        ("attention heads", heads),
        ("key-value heads", groups),
        ("ffn_hidden_size", fields["ffn_hidden_size"]),
    ):
        if size % tensor:
            fitting = [
                n for n in range(1, groups + 1) if not (heads % n or groups % n or fields["ffn_hidden_size"] % n)
            ]
            raise UserError(
                f"{section}.tensor={tensor} does not divide the model's {size} {name}; "
                f"tensor sizes that do: {', '.join(map(str, fitting))}"
            )
    if fields["num_layers"] % pipeline:
        fitting = [n for n in range(1, fields["num_layers"] + 1) if fields["num_layers"] % n == 0]
        raise UserError(
            f"{section}.pipeline={pipeline} does not divide the model's {fields['num_layers']} layers; "
            f"pipeline sizes that do: {', '.join(map(str, fitting))}"
        )


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
            raise UserError(
                f"parallel.virtual_pipeline={parallel.virtual_pipeline} x parallel.pipeline="
                f"{parallel.pipeline} does not divide the model's {fields['num_layers']} layers"
            )
        if data.layout != "bins":
            raise UserError(f"parallel.virtual_pipeline needs rows of one length: data.layout=bins, not {data.layout}")
    if parallel.context > 1 and data.layout == "padded":
        raise UserError("parallel.context splits packed sequences: data.layout=packed or bins, not padded")
    if data.share_prompts and not can_share_prompts(fields, parallel, data):
        raise UserError(
            "data.share_prompts computes a prompt once in a packed row: it needs data.layout=packed or bins, "
            "parallel.context=1 and a model without experts; set it to false"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            "parallel.sequence splits the sequence over the tensor-parallel group: it needs parallel.tensor > 1"
        )
    per_pass = data.micro_batch_size * data_parallel_size(parallel, ranks)
    if data.global_batch_size % per_pass:
        raise UserError(
            f"data.global_batch_size={data.global_batch_size} is no multiple of data.micro_batch_size="
            f"{data.micro_batch_size} x {per_pass // data.micro_batch_size} data-parallel ranks = {per_pass}"
        )
    if data.seq_length > fields["seq_length"]:
        raise UserError(
            f"data.seq_length={data.seq_length} is longer than the {fields['seq_length']} positions that the "
            f"model was trained for"
        )


def require_tensor_inside_node(parallel: ParallelSection, ranks_per_node: int) -> None:
    """Check that tensor-parallel groups do not cross nodes: they exchange activations in every layer.

    Training does not ask this: it works, at the speed of the network.

    Raises:
        UserError: they do.
    """
    if ranks_per_node % parallel.tensor:
        fitting = [n for n in range(1, ranks_per_node + 1) if ranks_per_node % n == 0]
        raise UserError(
            f"parallel.tensor={parallel.tensor} does not fit in a node of {ranks_per_node} ranks: tensor sizes "
            f"that do: {', '.join(map(str, fitting))}; raise parallel.pipeline instead"
        )


def require_experts_divide(fields: dict[str, Any], parallel: ParallelSection, ranks: int) -> None:
    """Check that experts and the ranks that hold them come out even.

    Raises:
        UserError: they do not, with the values that would.
    """
    experts, data_ranks = fields.get("num_moe_experts"), data_parallel_size(parallel, ranks)
    if parallel.expert == 1:
        return
    if not experts:
        raise UserError(f"parallel.expert={parallel.expert}: the model has no experts; set it to 1")
    if experts % parallel.expert:
        fitting = [n for n in range(1, experts + 1) if experts % n == 0]
        raise UserError(
            f"parallel.expert={parallel.expert} does not divide the model's {experts} experts; "
            f"expert sizes that do: {', '.join(map(str, fitting))}"
        )
    if data_ranks % parallel.expert:
        raise UserError(
            f"parallel.expert={parallel.expert} shares experts out among data-parallel ranks, of which there "
            f"are {data_ranks}: it must divide them"
        )


def require_batch(data: DataSection) -> None:
    """Check that a micro-batch and a global batch mean something.

    Raises:
        UserError: a size below 1, or bins with a micro-batch size.
    """
    for name in ("seq_length", "micro_batch_size", "global_batch_size", "epochs", "pad_to_multiple_of"):
        if getattr(data, name) < 1:
            raise UserError(f"data.{name}={getattr(data, name)} must be at least 1")
    if data.layout == "bins" and data.micro_batch_size != 1:
        raise UserError(
            f"data.layout=bins packs as many pairs as fit data.bin_size into a micro-batch: "
            f"data.micro_batch_size={data.micro_batch_size} means nothing there, set it to 1 and choose "
            "data.bin_size"
        )
