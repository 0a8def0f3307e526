"""Conversion of config.json to the fields of Megatron's config, as far as architectures share it."""

from collections.abc import Sequence
from typing import Any

from treg_megatron.errors import UserError


def decoder_fields(
    hf_config: dict, activation: str = "silu", activation_key: str = "hidden_act", tied_by_default: bool = False
) -> dict[str, Any]:
    """Sizes, norms and switches of a gated decoder without linear biases; rotary settings are the family's.

    Args:
        activation: the one activation function that the architecture is published with.
        activation_key: where config.json names it.
        tied_by_default: what an absent ``tie_word_embeddings`` means to transformers.

    Raises:
        UserError: another activation function.
        KeyError: config.json lacks a size.
    """
    found = hf_config.get(activation_key) or activation
    if found != activation:
        raise UserError(
            f"{activation_key} {found!r} is not supported for {architecture(hf_config)}; known: {activation}"
        )
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
        "share_embeddings_and_output_weights": hf_config.get("tie_word_embeddings", tied_by_default),
        "normalization": "RMSNorm",
        "layernorm_epsilon": hf_config.get("rms_norm_eps", 1e-6),
        "init_method_std": hf_config.get("initializer_range", 0.02),
        "activation": activation,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "attention_dropout": hf_config.get("attention_dropout", 0.0),
        "hidden_dropout": 0.0,
    }


def rope_settings(hf_config: dict) -> dict[str, Any]:
    """The rotary settings, from either spelling: ``rope_theta`` + ``rope_scaling``, or ``rope_parameters``."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    return {
        **rope,
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "rope_theta": rope.get("rope_theta", hf_config.get("rope_theta", 10000.0)),
    }


def rope_fields(hf_config: dict, known: Sequence[str] = ("default",)) -> dict[str, Any]:
    """``rotary_base`` of a config.json whose kind of rotary scaling is among ``known``.

    Raises:
        UserError: another kind of scaling.
    """
    rope = rope_settings(hf_config)
    if rope["rope_type"] not in known:
        raise UserError(
            f"rope scaling of type {rope['rope_type']!r} is not supported for {architecture(hf_config)}; "
            f"known: {', '.join(known)}"
        )
    # NeMo types it as an integer, and every published theta is one
    theta = float(rope["rope_theta"])
    return {"rotary_base": int(theta) if theta.is_integer() else theta}


def window_fields(window: int | None, sliding: Sequence[bool]) -> dict[str, Any]:
    """Sliding-window attention: ``window`` tokens in the layers where ``sliding`` says so."""
    if window is None or not any(sliding):
        return {"window_size": None}
    # transformers counts the token itself, Megatron the tokens before it
    fields: dict[str, Any] = {"window_size": (window - 1, 0)}
    if not all(sliding):
        fields["window_attn_skip_freq"] = [int(s) for s in sliding]
    return fields


def sliding_layers(hf_config: dict, otherwise: Sequence[bool]) -> list[bool]:
    """Which layers slide: config.json's ``layer_types``, or the architecture's rule where an older file has none."""
    types = hf_config.get("layer_types")
    return [t == "sliding_attention" for t in types] if types else list(otherwise)


def refuse_options(hf_config: dict, *options: str) -> None:
    """Raises :class:`UserError` if config.json turns one of ``options`` on: no map has parameters for it."""
    for option in options:
        if hf_config.get(option):
            raise UserError(f"{option}: true is not supported for {architecture(hf_config)}")


def architecture(hf_config: dict) -> str:
    return hf_config["architectures"][0]
