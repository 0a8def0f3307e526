"""Validation of a parallel layout against the model, the data and the number of ranks, without torch or Megatron."""

from typing import Any

from treg_megatron.config.schema import DataSection, ParallelSection
from treg_megatron.errors import UserError


def data_parallel_size(parallel: ParallelSection, ranks: int) -> int:
    """Data-parallel size: ranks divided by tensor x pipeline x context size.

    Raises:
        UserError: the number of ranks is not a multiple of tensor x pipeline x context size.
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
    """Check all layout constraints; training runs this first, preflight runs it without the cluster.

    Args:
        fields: the model's sizes, from ``families.model_fields``.

    Raises:
        UserError: a constraint fails; the message names the first, with valid values if they can be listed.
    """
    require_batch(data)
    data_parallel_size(parallel, ranks)
    require_divisible(fields, parallel, data, ranks)
    require_overlap(parallel)
    require_tensor_overlap(parallel, data)
    require_experts_divide(fields, parallel, ranks)


def data_overlap(parallel: ParallelSection, on_gpu: bool) -> tuple[bool, bool]:
    """Whether gradients are reduced during the backward pass, and weights gathered during the forward pass.

    Args:
        on_gpu: what null in ``parallel.overlap_grad_reduce`` stands for.
    """
    reduce, gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    if reduce is None:
        reduce = on_gpu or bool(gather)
    return reduce, reduce if gather is None else gather


def require_overlap(parallel: ParallelSection) -> None:
    """Check that the overlaps can be combined.

    Raises:
        UserError: they cannot.
    """
    if parallel.overlap_param_gather and parallel.overlap_grad_reduce is False:
        raise UserError(
            "parallel.overlap_param_gather gathers weights in the buckets that parallel.overlap_grad_reduce makes: set "
            "both to true, or neither"
        )


def rows_of_one_length(parallel: ParallelSection) -> bool:
    """Whether every row must be padded to the size of a bin."""
    return bool(parallel.virtual_pipeline or parallel.tensor_overlap)


def require_tensor_overlap(parallel: ParallelSection, data: DataSection) -> None:
    """Check that there is communication to overlap, and that it fits buffers of one size.

    Raises:
        UserError: ``parallel.tensor_overlap`` cannot be combined with the layout.
    """
    if parallel.tensor_overlap and not parallel.sequence:
        raise UserError(
            "parallel.tensor_overlap overlaps what sequence parallelism communicates: it needs parallel.sequence=true"
        )
    if parallel.tensor_overlap and data.layout != "bins":
        raise UserError(
            f"parallel.tensor_overlap needs rows of one length, for its buffers: data.layout=bins, not {data.layout}"
        )


def can_share_prompts(fields: dict[str, Any], parallel: ParallelSection, data: DataSection) -> bool:
    """Whether the layout allows ``data.share_prompts``; the installed stack must allow it too
    (``build.shares_prompts``)."""
    return data.layout != "padded" and parallel.context == 1 and not fields.get("num_moe_experts")


def require_split(fields: dict[str, Any], tensor: int, pipeline: int, section: str) -> None:
    """Check that tensor and pipeline sizes divide the model.

    Args:
        fields: the model's sizes, from ``families.model_fields``.
        section: recipe section of ``tensor`` and ``pipeline``, for the message.

    Raises:
        UserError: one of them does not; the message lists the values that do.
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
    """Check that the layout divides the model and the batch, and that its options can be combined.

    Args:
        fields: the model's sizes, from ``families.model_fields``.

    Raises:
        UserError: a size does not divide (the message lists those that do), or options cannot be combined.
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
            raise UserError(
                f"parallel.virtual_pipeline needs sequences of one length: data.layout=bins, not {data.layout}"
            )
    if parallel.context > 1 and data.layout == "padded":
        raise UserError("parallel.context splits packed sequences: data.layout=packed or bins, not padded")
    if data.share_prompts and not can_share_prompts(fields, parallel, data):
        raise UserError(
            "data.share_prompts computes the prompt of each pair once in a packed sequence: it needs "
            "data.layout=packed or bins, parallel.context=1 and a model without experts; set it to false"
        )
    if parallel.sequence and parallel.tensor == 1:
        raise UserError(
            "parallel.sequence splits the sequence over the tensor-parallel group: it needs parallel.tensor > 1"
        )
    per_pass = data.micro_batch_size * data_parallel_size(parallel, ranks)
    if data.global_batch_size % per_pass:
        raise UserError(
            f"data.global_batch_size={data.global_batch_size} is not a multiple of data.micro_batch_size="
            f"{data.micro_batch_size} x {per_pass // data.micro_batch_size} data-parallel ranks = {per_pass}"
        )
    if data.seq_length > fields["seq_length"]:
        raise UserError(
            f"data.seq_length={data.seq_length} exceeds the model's maximum sequence length of "
            f"{fields['seq_length']} tokens"
        )


def require_tensor_inside_node(parallel: ParallelSection, ranks_per_node: int) -> None:
    """Check that tensor-parallel groups, which exchange activations in every layer, stay within a node.

    Training does not require this: it works across nodes, at the speed of the network.

    Raises:
        UserError: a group spans nodes.
    """
    if ranks_per_node % parallel.tensor:
        fitting = [n for n in range(1, ranks_per_node + 1) if ranks_per_node % n == 0]
        raise UserError(
            f"parallel.tensor={parallel.tensor} does not fit in a node of {ranks_per_node} ranks: tensor sizes "
            f"that do: {', '.join(map(str, fitting))}; raise parallel.pipeline instead"
        )


def require_experts_divide(fields: dict[str, Any], parallel: ParallelSection, ranks: int) -> None:
    """Check that experts divide evenly over expert-parallel ranks.

    Raises:
        UserError: they do not; the message lists the expert-parallel sizes that do.
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
            f"parallel.expert={parallel.expert} distributes experts over the data-parallel ranks: it must divide "
            f"their number, {data_ranks}"
        )


def require_batch(data: DataSection) -> None:
    """Check the batch sizes and lengths of the ``data`` section.

    Raises:
        UserError: a size is below 1, or ``data.layout=bins`` is combined with a micro-batch size other than 1.
    """
    for name in ("seq_length", "micro_batch_size", "global_batch_size", "epochs", "pad_to_multiple_of"):
        if getattr(data, name) < 1:
            raise UserError(f"data.{name}={getattr(data, name)} must be at least 1")
    if data.layout == "bins" and data.micro_batch_size != 1:
        raise UserError(
            f"data.layout=bins fills each micro-batch with as many pairs as fit into data.bin_size: "
            f"data.micro_batch_size={data.micro_batch_size} has no effect there; set it to 1 and choose "
            "data.bin_size"
        )
