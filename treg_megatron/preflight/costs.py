"""Cost of a training step, checkpoints and labelling: FLOPs, bytes communicated, bytes on disk."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from treg_megatron.config.schema import ClusterSection, DataSection, LabelSection, ParallelSection

if TYPE_CHECKING:
    from treg_megatron.preflight.activations import Pass

FORWARD_AND_BACKWARD = 3  # in units of a forward pass: the backward pass has two matmuls for each one forward
ELEMENT = {"fp32": 4, "bf16": 2}  # bytes


class Work(NamedTuple):
    """FLOPs of one sequence's forward pass (a multiply-add is two)."""

    layers: float  # matrix products of the layers; experts count for the tokens routed to them
    attention: float  # scores and weighted values; causal, so half of the square
    head: float  # the output embedding on response tokens

    @property
    def total(self) -> float:
        """All FLOPs of the forward pass."""
        return sum(self)


def forward_flops(fields: dict[str, Any], tokens: int, responses: int) -> Work:
    """FLOPs of one sequence's forward pass: 2 per weight and token in every matmul; in attention 4 per head, head
    dimension and visible (query, key) pair (arXiv 2205.05198, appendix A, with causal attention counted as half).

    Args:
        fields: the model's sizes, from ``families.model_fields``.
        tokens: length of the sequence.
        responses: response tokens, the only ones that the log-prob head computes.
    """
    hidden, heads, width = fields["hidden_size"], fields["num_attention_heads"], fields["kv_channels"]
    attention_weights = hidden * width * (2 * heads + 2 * fields["num_query_groups"])
    experts = fields.get("moe_router_topk", 1)
    mlp_weights = 3 * hidden * fields["ffn_hidden_size"] * experts
    router = hidden * fields.get("num_moe_experts", 0)
    window = (fields.get("window_size") or (tokens, 0))[0]
    slides = fields.get("window_attn_skip_freq") or [fields.get("window_size") is not None] * fields["num_layers"]
    scores = sum(_positions(tokens, window if slid else tokens) for slid in slides)
    return Work(
        layers=2.0 * tokens * fields["num_layers"] * (attention_weights + mlp_weights + router),
        attention=4.0 * heads * width * scores,
        head=2.0 * responses * hidden * fields["vocab_size"],
    )


def _positions(tokens: int, window: int) -> float:
    """Number of (query, visible key) pairs in causal attention with a sliding window."""
    seen = min(tokens, window)
    return seen * seen / 2 + (tokens - seen) * seen


def step_flops(
    fields: dict[str, Any], data: DataSection, adapters: bool = False, recompute_layers: bool = False
) -> float:
    """FLOPs of one optimizer step if every sequence has the full length and half of it is response.

    Args:
        adapters: frozen weights have no gradient, so their matmuls have one backward matmul each (the adapters' own are
            left out).
        recompute_layers: whether the layers run forward twice.
    """
    sequence = forward_flops(fields, data.seq_length, data.seq_length // 2)
    weights = (FORWARD_AND_BACKWARD - adapters) * (sequence.layers + sequence.head)
    again = recompute_layers * (sequence.layers + sequence.attention)
    return 2 * data.global_batch_size * (weights + FORWARD_AND_BACKWARD * sequence.attention + again)


def label_flops(fields: dict[str, Any], data: DataSection, pairs: int) -> float:
    """FLOPs of labelling: three forward passes per response, two with a revision prompt, which repeats the response."""
    plain = forward_flops(fields, data.seq_length, data.seq_length // 2).total
    revision = forward_flops(fields, data.seq_length * 3 // 2, data.seq_length // 2).total
    return pairs * 2 * (plain + 2 * revision)


def hours(flops: float, ranks: int, cluster: ClusterSection, utilisation: float) -> float:
    """Hours that all ranks together take for ``flops`` at this share of their peak."""
    return flops / (ranks * cluster.peak_tflops * 1e12 * utilisation) / 3600


def moved_in_a_step(
    passes: Iterable["Pass"],
    names: dict[str, str],
    micro_batches: int,
    gradients: int,
    weights: int,
    hidden: int,
    stages: int,
    data_ranks: int,
) -> dict[str, int]:
    """Bytes that a rank passes to the collectives of each kind of group and to its pipeline neighbours per step.

    Args:
        passes: one micro-batch on each model chunk of the rank.
        names: kinds of the process groups, see :func:`treg_megatron.preflight.world.group_names`.
        gradients, weights: bytes of the rank's buffers, which data parallelism reduces and gathers once per step.
        hidden: bytes of a micro-batch's hidden states between two stages.
    """
    moved: Counter[str] = Counter()
    for run in passes:
        for (group, _), nbytes in run.moved.items():
            if group in names:
                moved[names[group]] += nbytes * micro_batches
    if stages > 1:
        moved["pipeline"] = 2 * hidden * micro_batches
    if data_ranks > 1:
        moved["data"] = gradients + weights
    return dict(moved)


class Checkpoint(NamedTuple):
    """Size of a training checkpoint in bytes, and the seconds that writing it takes."""

    nbytes: int
    seconds: float


def checkpoint_bytes(trainable: int, frozen: int, precision: str) -> int:
    """Bytes of a checkpoint: all weights, and for each trained parameter its fp32 main copy and Adam's two moments."""
    return (trainable + frozen) * ELEMENT[precision] + trainable * 12


def checkpoint(trainable: int, frozen: int, precision: str, cluster: ClusterSection) -> Checkpoint:
    """Cost of one checkpoint: bytes, and seconds to write them."""
    nbytes = checkpoint_bytes(trainable, frozen, precision)
    return Checkpoint(nbytes, nbytes / (cluster.storage_bandwidth * 1e9))


def saving_host_bytes(elements: list[tuple[int, int]], parallel: ParallelSection, ranks: int, per_node: int) -> int:
    """Host memory that saving needs on the fullest node, at its peak.

    The first data-parallel rank of each group gathers three fp32 values per trained parameter of its model-parallel
    part, one kind of value after the other: all three, and one of them twice more while its pieces are joined.

    Args:
        elements: trained parameters of a rank of each stage: those that all its data-parallel ranks hold, and experts'.
        ranks: of the whole job. per_node: of a node.
    """
    by_node: Counter[int] = Counter()
    for stage, (dense, experts) in enumerate(elements):
        first = stage * (ranks // parallel.pipeline)
        for rank in range(parallel.tensor * parallel.expert):
            held = experts + (dense if rank < parallel.tensor else 0)
            by_node[(first + rank) // per_node] += held * 4 * (3 + 2)
    return max(by_node.values())


def label_memory(parameters: int, label: LabelSection, fields: dict[str, Any]) -> float:
    """Memory of a labelling rank in bytes: its weights, of every model that scores, and one layer's activations in a
    forward pass."""
    element = {"float32": 4, "bfloat16": 2}[label.dtype]
    split = label.tensor * label.pipeline if label.engine == "megatron" else 1
    token = 4 * fields["hidden_size"] + 3 * fields["ffn_hidden_size"] // label.tensor
    models = 1 + sum(model is not None for model in (label.better_model, label.worse_model))
    return models * parameters * element / split + label.batch_tokens * token * element
