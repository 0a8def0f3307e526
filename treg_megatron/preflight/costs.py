"""What a step and the stations around it cost: arithmetic, bytes over links, bytes to disk."""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from treg_megatron.config.schema import ClusterSection, DataSection, LabelSection

if TYPE_CHECKING:
    from treg_megatron.preflight.activations import Pass

FORWARD_AND_BACKWARD = 3  # the backward pass does each product's arithmetic twice
ELEMENT = {"fp32": 4, "bf16": 2}


class Work(NamedTuple):
    """Multiply-adds times two, of one sequence's forward pass."""

    layers: float  # every matrix product of the layers, those of an expert only for the tokens sent to it
    attention: float  # scores and weighted values, causal: half of the square
    head: float  # the output embedding on response tokens

    @property
    def total(self) -> float:
        return sum(self)


def forward_flops(fields: dict[str, Any], tokens: int, responses: int) -> Work:
    """Operations of one sequence: 2 per weight and token in every product, 4 per head width, pair of positions and head
    in attention (arXiv 2205.05198, appendix A, with causal attention counted as half).

    Args:
        fields: the model's sizes, as ``families.model_fields`` gives them.
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
    """Pairs of a query and a key that it may see, at most ``window`` tokens back."""
    seen = min(tokens, window)
    return seen * seen / 2 + (tokens - seen) * seen


def step_flops(fields: dict[str, Any], data: DataSection) -> float:
    """Of one optimizer step with every sequence as long as the recipe allows and half of it response."""
    sequence = forward_flops(fields, data.seq_length, data.seq_length // 2).total
    return FORWARD_AND_BACKWARD * 2 * data.global_batch_size * sequence


def label_flops(fields: dict[str, Any], data: DataSection, pairs: int) -> float:
    """Of labelling: three forward passes a response; the two revision prompts hold the response once more."""
    plain = forward_flops(fields, data.seq_length, data.seq_length // 2).total
    revision = forward_flops(fields, data.seq_length * 3 // 2, data.seq_length // 2).total
    return pairs * 2 * (plain + 2 * revision)


def hours(flops: float, ranks: int, cluster: ClusterSection) -> float:
    """At the utilisation that the recipe states."""
    return flops / (ranks * cluster.peak_tflops * 1e12 * cluster.mfu) / 3600


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
    """Bytes that one rank puts into the collectives of each kind of group, and receives from its pipeline neighbour.

    Args:
        names: of the groups, see :func:`treg_megatron.preflight.world.group_names`.
        gradients, weights: bytes of the rank's buffers, which data parallelism reduces and gathers once a step.
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
    """A training checkpoint: bytes, and seconds that the file system takes for it."""

    nbytes: int
    seconds: float


def checkpoint_bytes(trainable: int, frozen: int, precision: str) -> int:
    """Weights once, and for each trained parameter its fp32 main parameter and Adam's two moments."""
    return (trainable + frozen) * ELEMENT[precision] + trainable * 12


def checkpoint(trainable: int, frozen: int, precision: str, cluster: ClusterSection) -> Checkpoint:
    """What one save of so many parameters costs."""
    nbytes = checkpoint_bytes(trainable, frozen, precision)
    return Checkpoint(nbytes, nbytes / (cluster.storage_bandwidth * 1e9))


def label_memory(parameters: int, label: LabelSection, fields: dict[str, Any]) -> float:
    """Bytes of a labelling rank: its weights, and one layer's activations of a forward pass."""
    element = {"float32": 4, "bfloat16": 2}[label.dtype]
    split = label.tensor * label.pipeline if label.engine == "megatron" else 1
    token = 4 * fields["hidden_size"] + 3 * fields["ffn_hidden_size"] // label.tensor
    return parameters * element / split + label.batch_tokens * token * element
