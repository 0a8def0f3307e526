"""One declarative parameter map per architecture: which Hugging Face tensors make up which Megatron parameter.

A map is a table of :class:`Parameter` rows. Everything else here is derived from it and from ``config.json``: the keys
and shapes in a Megatron checkpoint, the names inside a model, the shapes that the Hugging Face folder must hold, and
the way back. A new architecture is a new table and a function that turns its ``config.json`` into Megatron's fields.

Megatron stores the tensors of a parameter in one tensor, one after another along axis 0 (``linear_fc1``: all of gate,
then all of up), or interleaved by query group (``linear_qkv``: the query heads of a group, its key head, its value
head, then the next group), so that a tensor-parallel rank's part is a plain slice. Both are :class:`Interleaving`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from treg_megatron.errors import UserError


@dataclass(frozen=True)
class HFTensor:
    """A Hugging Face tensor: its name, ``{layer}`` standing for the layer number, and the names of its dimensions."""

    name: str
    dims: str


@dataclass(frozen=True)
class Parameter:
    """A Megatron parameter and the Hugging Face tensors that it holds.

    Attributes:
        name: parameter name under Transformer Engine's layer spec, ``{layer}`` standing for the layer number. The
            checkpoint key is the same without the layer number, whatever the spec: Megatron-core maps the names of
            its torch-native specs to it.
        sources: the tensors, in the order in which Megatron stores them.
        groups: the model field that counts the groups by which the sources interleave along axis 0; None: no
            interleaving.
        local_name: parameter name under a torch-native layer spec, where it differs.
    """

    name: str
    sources: tuple[HFTensor, ...]
    groups: str | None = None
    local_name: str | None = None

    @property
    def layered(self) -> bool:
        """Whether every layer has this parameter; all layers then share one checkpoint tensor, layers on axis 0."""
        return "{layer}" in self.name

    @property
    def key(self) -> str:
        """Key in a Megatron-core checkpoint."""
        return self.name.replace(".{layer}", "")


EMBEDDING = Parameter("embedding.word_embeddings.weight", (HFTensor("model.embed_tokens.weight", "vocab hidden"),))
FINAL_NORM = Parameter("decoder.final_layernorm.weight", (HFTensor("model.norm.weight", "hidden"),))
OUTPUT_LAYER = Parameter("output_layer.weight", (HFTensor("lm_head.weight", "vocab hidden"),))

LLAMA_LAYER = (
    Parameter(
        "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        (HFTensor("model.layers.{layer}.input_layernorm.weight", "hidden"),),
        local_name="decoder.layers.{layer}.input_layernorm.weight",
    ),
    Parameter(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        (
            HFTensor("model.layers.{layer}.self_attn.q_proj.weight", "query hidden"),
            HFTensor("model.layers.{layer}.self_attn.k_proj.weight", "kv hidden"),
            HFTensor("model.layers.{layer}.self_attn.v_proj.weight", "kv hidden"),
        ),
        groups="num_query_groups",
    ),
    Parameter(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        (HFTensor("model.layers.{layer}.self_attn.o_proj.weight", "hidden query"),),
    ),
    Parameter(
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        (HFTensor("model.layers.{layer}.post_attention_layernorm.weight", "hidden"),),
        local_name="decoder.layers.{layer}.pre_mlp_layernorm.weight",
    ),
    Parameter(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        (
            HFTensor("model.layers.{layer}.mlp.gate_proj.weight", "ffn hidden"),
            HFTensor("model.layers.{layer}.mlp.up_proj.weight", "ffn hidden"),
        ),
    ),
    Parameter(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        (HFTensor("model.layers.{layer}.mlp.down_proj.weight", "hidden ffn"),),
    ),
)

# Modules that ask a checkpoint for `_extra_state`: FP8 scales in Transformer Engine, nothing in the torch-native specs.
EXTRA_STATE_MODULES = (
    "decoder.layers.{layer}.self_attention.core_attention",
    "decoder.layers.{layer}.self_attention.linear_qkv",
    "decoder.layers.{layer}.self_attention.linear_proj",
    "decoder.layers.{layer}.mlp.linear_fc1",
    "decoder.layers.{layer}.mlp.linear_fc2",
    "decoder.final_layernorm",
)


@dataclass(frozen=True)
class Family:
    """An architecture that can be converted and trained.

    Attributes:
        architecture: the name in ``architectures`` of config.json.
        layer: its parameters in every layer.
        fields: turns config.json into Megatron's fields, or refuses it.
        nemo_config: name of NeMo's config dataclass for a config.json.
        nemo_model: name of NeMo's model class.
        ignored_suffixes: tensors that old folders hold and that are no weights.
    """

    architecture: str
    layer: tuple[Parameter, ...]
    fields: Callable[[dict], dict[str, Any]]
    nemo_config: Callable[[dict], str]
    nemo_model: str
    ignored_suffixes: tuple[str, ...] = ()

    def parameters(self, fields: dict[str, Any]) -> list[Parameter]:
        """All parameters of a model with these fields, in the order of its Hugging Face tensors."""
        tied = fields["share_embeddings_and_output_weights"]
        return [EMBEDDING, *self.layer, FINAL_NORM] + ([] if tied else [OUTPUT_LAYER])


class Interleaving:
    """The exact, invertible layout of several tensors in one: by group along axis 0, in order within a group.

    ``groups=1`` is plain concatenation.
    """

    def __init__(self, groups: int, rows: list[int]):
        """``rows``: how many rows (axis 0) each tensor has; each is a multiple of ``groups``."""
        self.groups = groups
        self.rows_per_group = [r // groups for r in rows]

    def part(self, merged: torch.Tensor, index: int) -> torch.Tensor:
        """The view [groups, rows / groups, ...] of ``merged`` ([sum of rows, ...]) that holds tensor ``index``.

        Copy into it to merge, read it to split.
        """
        grouped = merged.view(self.groups, sum(self.rows_per_group), *merged.shape[1:])
        return grouped.narrow(1, sum(self.rows_per_group[:index]), self.rows_per_group[index])


def interleaving(parameter: Parameter, fields: dict[str, Any]) -> Interleaving:
    """How the sources of ``parameter`` lie in it, for a model with these fields."""
    groups = fields[parameter.groups] if parameter.groups else 1
    return Interleaving(groups, [source_shape(s, fields)[0] for s in parameter.sources])


def source_shape(tensor: HFTensor, fields: dict[str, Any]) -> tuple[int, ...]:
    """Shape of one Hugging Face tensor of a model with these fields."""
    sizes = {
        "vocab": fields["vocab_size"],
        "hidden": fields["hidden_size"],
        "ffn": fields["ffn_hidden_size"],
        "query": fields["num_attention_heads"] * fields["kv_channels"],
        "kv": fields["num_query_groups"] * fields["kv_channels"],
    }
    return tuple(sizes[d] for d in tensor.dims.split())


def parameter_shape(parameter: Parameter, fields: dict[str, Any]) -> tuple[int, ...]:
    """Shape of one layer's Megatron parameter (unpadded vocabulary) of a model with these fields."""
    shapes = [source_shape(s, fields) for s in parameter.sources]
    return (sum(s[0] for s in shapes), *shapes[0][1:])


def in_model_order(family: Family, fields: dict[str, Any]) -> Iterator[tuple[Parameter, int | None]]:
    """Every parameter with its layer number, in the order of a transformers model: embedding, layers, the rest."""
    parameters = family.parameters(fields)
    layered = [p for p in parameters if p.layered]
    first = parameters.index(layered[0])
    yield from ((p, None) for p in parameters[:first])
    yield from ((p, layer) for layer in range(fields["num_layers"]) for p in layered)
    yield from ((p, None) for p in parameters[first + len(layered):])


def family_of(hf_config: dict) -> Family:
    """The family of a config.json.

    Raises:
        UserError: an architecture that we do not know.
    """
    names = hf_config.get("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise UserError(f"architecture {', '.join(names) or '(none in config.json)'} is not supported; "
                    f"known: {', '.join(FAMILIES)}")


def model_fields(hf_config: dict) -> dict[str, Any]:
    """Keyword arguments of the model's NeMo config dataclass (a Megatron-core ``TransformerConfig``), JSON-able.

    ``vocab_size`` is the true, unpadded vocabulary, ``seq_length`` the longest position, ``activation`` the name of
    the activation function: the one key that is no field of the dataclass.

    Raises:
        UserError: an unknown architecture, or an option of it that is not supported.
    """
    family = family_of(hf_config)
    if hf_config.get("quantization_config"):
        raise UserError("the model is quantized (quantization_config in config.json); "
                        "start from its full-precision weights")
    try:
        return family.fields(hf_config)
    except KeyError as error:
        raise UserError(f"config.json of a {family.architecture} lacks {error}") from None


def nemo_config_class(hf_config: dict) -> str:
    """Name of the config dataclass in ``nemo.collections.llm`` that takes :func:`model_fields`."""
    return family_of(hf_config).nemo_config(hf_config)


def _rope(hf_config: dict) -> dict[str, Any]:
    """The rotary settings, from either spelling: ``rope_theta`` + ``rope_scaling``, or ``rope_parameters``."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    return {
        **rope,
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "rope_theta": rope.get("rope_theta", hf_config.get("rope_theta", 10000.0)),
    }


def _llama_rope_fields(hf_config: dict) -> dict[str, Any]:
    rope = _rope(hf_config)
    # NeMo types it as an integer, and every published theta is one
    theta = float(rope["rope_theta"])
    fields: dict[str, Any] = {"rotary_base": int(theta) if theta.is_integer() else theta}
    if rope["rope_type"] == "default":
        return fields
    if rope["rope_type"] != "llama3":
        raise UserError(f"rope scaling of type {rope['rope_type']!r} is not supported for LlamaForCausalLM; "
                        "known: default, llama3")
    return fields | {
        "scale_factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "old_context_len": rope["original_max_position_embeddings"],
    }


def _llama_fields(hf_config: dict) -> dict[str, Any]:
    for option in ("attention_bias", "mlp_bias"):
        if hf_config.get(option):
            raise UserError(f"{option}: true is not supported for LlamaForCausalLM")
    activation = hf_config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(f"hidden_act {activation!r} is not supported for LlamaForCausalLM; known: silu")
    heads, hidden = hf_config["num_attention_heads"], hf_config["hidden_size"]
    return {
        "num_layers": hf_config["num_hidden_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": hf_config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": hf_config.get("num_key_value_heads") or heads,
        "kv_channels": hf_config.get("head_dim") or hidden // heads,
        "vocab_size": hf_config["vocab_size"],
        "seq_length": hf_config.get("max_position_embeddings", 2048),
        "share_embeddings_and_output_weights": hf_config.get("tie_word_embeddings", False),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf_config.get("rms_norm_eps", 1e-6),
        "init_method_std": hf_config.get("initializer_range", 0.02),
        "activation": activation,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "attention_dropout": hf_config.get("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
        **_llama_rope_fields(hf_config),
    }


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family(
            architecture="LlamaForCausalLM",
            layer=LLAMA_LAYER,
            fields=_llama_fields,
            nemo_config=lambda c: "LlamaConfig" if _rope(c)["rope_type"] == "default" else "Llama31Config",
            nemo_model="LlamaModel",
            ignored_suffixes=(".rotary_emb.inv_freq",),
        ),
    )
}
