"""Search for the fastest layout that fits a cluster: sorted and pruned by formula, and only then built."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from treg_megatron.distributed.layout import data_parallel_size
from treg_megatron.errors import UserError
from treg_megatron.models.architecture import hf_config_of
from treg_megatron.models.families import Family, family_of, model_fields, stacked_shape
from treg_megatron.preflight import costs, steps
from treg_megatron.preflight.gpus import utilisation
from treg_megatron.preflight.plan import Plan, Sections, make_plan, require_possible

RECOMPUTE = ("none", "selective", "full")


def parameter_counts(family: Family, fields: dict[str, Any]) -> tuple[int, int, int]:
    """Parameters of all layers without experts, of all experts, and of the embedding."""
    dense = experts = 0
    for parameter in family.layer_parameters(fields):
        count = math.prod(stacked_shape(parameter, fields))
        if "num_moe_experts" in parameter.stacking:
            experts += count
        else:
            dense += count
    return dense, experts, fields["vocab_size"] * fields["hidden_size"]


class Layout(NamedTuple):
    """A layout with what formulas say about it."""

    sections: Sections
    seconds: float  # per step, see :func:`seconds`
    least_memory: float  # bytes, see :func:`least_memory`


def layouts(sections: Sections) -> list[Layout]:
    """Every layout of the cluster, the fastest first, whether or not it fits; micro-batches and batch stay.

    Layouts within 3 % of each other count as equally fast: the one that recomputes least comes first, then the one with
    most rows per expert, the shorter pipeline, the fewer chunks and the smaller tensor-parallel group.
    """
    hf_config = hf_config_of(sections.model)
    fields, counts = model_fields(hf_config), parameter_counts(family_of(hf_config), model_fields(hf_config))
    found = [
        Layout(each, seconds(each, fields, sum(counts)), least_memory(each, fields, counts))
        for each in _candidates(sections, fields)
    ]
    return sorted(found, key=_order)


def _order(layout: Layout) -> tuple:
    parallel, train = layout.sections.parallel, layout.sections.train
    return (
        round(math.log(layout.seconds, 1.03)),
        RECOMPUTE.index(train.recompute),
        -parallel.expert,
        parallel.pipeline,
        parallel.virtual_pipeline or 1,
        parallel.tensor,
    )


def fitting(sections: Sections, share: float = 1.0, most_built: int | None = None) -> Iterator[Plan]:
    """Plans of the layouts that fit, the fastest first; of those that differ only in recompute or chunks, the first.

    Only the first and the last stage of each are built: one of them needs the most memory.

    Args:
        share: of a rank's memory that may be used.
        most_built: give up after building so many.
    """
    memory, splits, built = share * sections.cluster.gpu_memory * 1e9, set(), 0
    for layout in layouts(sections):
        candidate = layout.sections
        if layout.least_memory > memory or split_of(candidate) in splits:
            continue
        if built == most_built:
            return
        built += 1
        plan = make_plan(candidate, stages=sorted({0, candidate.parallel.pipeline - 1}))
        if plan.stages[plan.fullest].total <= memory:
            splits.add(split_of(candidate))
            yield plan


def split_of(sections: Sections) -> tuple[int, int, int]:
    """How the model is split: tensor, pipeline and expert sizes."""
    return sections.parallel.tensor, sections.parallel.pipeline, sections.parallel.expert


def seconds(sections: Sections, fields: dict[str, Any], parameters: int) -> float:
    """Seconds per step, to compare layouts: arithmetic, bubble, and the communication that nothing hides.

    Bins are taken to hold ordinary pairs: with few micro-batches a long pipeline loses more.
    """
    parallel, data, cluster = sections.parallel, sections.data, sections.cluster
    fill = steps.TYPICAL_FILL if data.layout == "bins" else 1.0
    data_ranks = data_parallel_size(parallel, sections.ranks)
    flops = fill * steps.flops(fields, data, sections.lora, sections.train)
    share = utilisation(cluster, fields, parameters).share
    compute = 3600 * costs.hours(flops, sections.ranks, cluster, share)
    return compute / (1 - steps.bubble(parallel, data, data_ranks, fill)) + _exposed(sections, fields, data_ranks, fill)


def _exposed(sections: Sections, fields: dict[str, Any], data_ranks: int, fill: float) -> float:
    """Seconds of the collectives inside layers and of the transfers between stages, at their links' bandwidth."""
    parallel, data, cluster = sections.parallel, sections.data, sections.cluster
    rows = _rows(sections)
    hidden = 2 * rows * fields["hidden_size"]  # bytes of a micro-batch's hidden states in bf16, over the tensor group
    micro_batches = steps.micro_batches(parallel, data, data_ranks, fill)
    passes = 3 if sections.train.recompute == "full" else 2
    layers = fields["num_layers"] / parallel.pipeline
    # an all-gather and a reduce-scatter around attention and around the MLP in each pass
    inside = 4 * passes * layers * hidden * (parallel.tensor - 1) / parallel.tensor / (cluster.node_bandwidth * 1e9)
    if parallel.expert > 1:
        crossing = parallel.tensor * parallel.expert > cluster.gpus_per_node
        link = cluster.network_bandwidth if crossing else cluster.node_bandwidth
        routed = hidden * fields["moe_router_topk"] / parallel.tensor * (parallel.expert - 1) / parallel.expert
        inside += 2 * passes * layers * routed / (link * 1e9)
    chunks = parallel.virtual_pipeline or 1
    between = 2 * chunks * hidden / parallel.tensor / (cluster.network_bandwidth * 1e9) if parallel.pipeline > 1 else 0
    return micro_batches * (inside + between)


def bound(sections: Sections) -> float:
    """:func:`least_memory` of a recipe.

    Raises:
        UserError: the layout does not divide the ranks.
    """
    hf_config = hf_config_of(sections.model)
    fields = model_fields(hf_config)
    return least_memory(sections, fields, parameter_counts(family_of(hf_config), fields))


def least_memory(sections: Sections, fields: dict[str, Any], counts: tuple[int, int, int]) -> float:
    """Lower bound of the first stage's memory in bytes: weights, gradients, optimizer state, and activations that every
    implementation keeps. Attention is taken to keep no scores.

    Args:
        counts: see :func:`parameter_counts`.
    """
    parallel, data, trains_all = sections.parallel, sections.data, sections.lora.rank is None
    data_ranks = data_parallel_size(parallel, sections.ranks)
    dense, experts, embedding = counts
    element = costs.ELEMENT[sections.train.precision]
    shared = (dense / parallel.pipeline + embedding) / parallel.tensor
    routed = experts / parallel.pipeline / parallel.tensor / parallel.expert
    state = (8 + (4 if element == 2 else 0)) * (1 - sections.optimizer.offload)
    at_rest = (shared + routed) * element
    if trains_all:
        with_experts = data_ranks * parallel.context
        at_rest += (shared + routed) * 4 + state * (shared / with_experts + routed * parallel.expert / with_experts)
    chunks = parallel.virtual_pipeline or 1
    stages, micro_batches = parallel.pipeline, steps.micro_batches(parallel, data, data_ranks)
    in_flight = stages if chunks == 1 else (stages - 1) * 2 + (chunks - 1) * stages + 1
    in_flight = min(in_flight, micro_batches * chunks) / chunks  # micro-batches on all layers of the stage
    kept = _kept(sections, fields) * _rows(sections) * fields["num_layers"] / stages
    return at_rest + in_flight * kept


def _rows(sections: Sections) -> int:
    """Tokens of the largest micro-batch on one context-parallel rank."""
    data = sections.data
    tokens = data.tokens_of_a_bin if data.layout == "bins" else 2 * data.micro_batch_size * data.seq_length
    return tokens // sections.parallel.context


def _kept(sections: Sections, fields: dict[str, Any]) -> float:
    """Bytes per token that a layer keeps for its backward pass, on one tensor-parallel rank."""
    hidden, parallel = fields["hidden_size"], sections.parallel
    element = costs.ELEMENT[sections.train.precision]
    split = parallel.tensor if parallel.sequence else 1
    if sections.train.recompute == "full":
        return element * hidden / split
    query = fields["num_attention_heads"] * fields["kv_channels"]
    projected = query + 2 * fields["num_query_groups"] * fields["kv_channels"]
    mlp = 3 * fields["ffn_hidden_size"] * fields.get("moe_router_topk", 1)  # gate, up, and their product
    return element * (3 * hidden / split + (projected + query + mlp) / parallel.tensor)


def _candidates(sections: Sections, fields: dict[str, Any]) -> Iterator[Sections]:
    """Every layout of the cluster that training would accept."""
    layers, experts = fields["num_layers"], fields.get("num_moe_experts") or 1
    for tensor in _divisors(sections.cluster.gpus_per_node):
        for pipeline in _divisors(layers):
            if sections.ranks % (tensor * pipeline * sections.parallel.context):
                continue
            interleaved = pipeline > 1 and sections.data.layout == "bins"
            for chunks in _divisors(layers // pipeline) if interleaved else (1,):
                for expert in _divisors(experts):
                    layout = {
                        "tensor": tensor,
                        "pipeline": pipeline,
                        "expert": expert,
                        "sequence": tensor > 1,
                        "virtual_pipeline": chunks if chunks > 1 else None,
                        "tensor_overlap": sections.parallel.tensor_overlap and tensor > 1,
                    }
                    candidate = sections.with_keys(parallel=layout)
                    try:
                        require_possible(candidate)
                    except UserError:
                        continue
                    for recompute in RECOMPUTE:
                        yield candidate.with_keys(train={"recompute": recompute})


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
