"""Conversion of config.json to the fields of Megatron's config, as far as architectures share it.

Every value is read by :func:`size`, :func:`number` or :func:`switch`, which refuse what transformers could not compute
with. Keys that config.json lacks have been filled in by :func:`treg_megatron.models.families.model_fields`.
"""

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from treg_megatron.errors import UserError

#: what transformers takes for a key that config.json lacks; architectures that differ say so in ``Family.defaults``
DEFAULTS: dict[str, Any] = {
    "attention_dropout": 0.0,
    "head_dim": None,  # hidden size / heads
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 2048,
    "num_key_value_heads": None,  # one for each query head
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}

# Beyond every published model; a larger value is a slip, and lists of that length would not fit into memory.
MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1

#: what a layer's attention sees, as config.json calls it
LAYER_TYPES = ("full_attention", "sliding_attention")


def size(hf_config: dict, key: str, least: int = 1, most: int = MAX_SIZE) -> int:
    """A whole number of config.json.

    Raises:
        UserError: it is null, of another type, or out of range.
        KeyError: config.json lacks it.
    """
    value = hf_config[key]
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        refuse(hf_config, key, f"a whole number between {least:,} and {most:,}")
    return value


def optional_size(hf_config: dict, key: str) -> int | None:
    """:func:`size` of a key that may be null."""
    return None if hf_config[key] is None else size(hf_config, key)


def number(hf_config: dict, key: str, expected: str = "a positive number", zero: bool = False) -> int | float:
    """A finite number of config.json, above zero unless ``zero`` is allowed; errors as in :func:`size`."""
    value = hf_config[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        refuse(hf_config, key, expected)
    if not (0 < value <= sys.float_info.max or zero and value == 0):  # an integer may exceed every float
        refuse(hf_config, key, expected)
    return value


def optional_number(hf_config: dict, key: str) -> int | float | None:
    """:func:`number` of a key that may be null."""
    return None if hf_config[key] is None else number(hf_config, key)


def switch(hf_config: dict, key: str) -> bool:
    """true or false; null and an absent key are false. Errors as in :func:`size`."""
    value = hf_config.get(key)
    if value is not None and not isinstance(value, bool):
        refuse(hf_config, key, "true or false")
    return bool(value)


def refuse(hf_config: dict, key: str, expected: str, value: Any = None) -> NoReturn:
    """Raises :class:`UserError` that says what ``key`` is (``value``, if not at the top level) and should be."""
    found = shown(hf_config.get(key) if value is None else value)
    raise UserError(f"config.json of a {architecture(hf_config)}: {key} is {found}, which should be {expected}")


def shown(value: Any) -> str:
    """A value of config.json for a message, shortened."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def decoder_fields(
    hf_config: dict,
    activation: str = "silu",
    activation_key: str = "hidden_act",
    ffn: str = "intermediate_size",
) -> dict[str, Any]:
    """Sizes, norms and switches of a gated decoder without linear biases; rotary settings are the family's.

    Args:
        activation: the one activation function that the architecture is published with.
        activation_key: where config.json names it.
        ffn: where config.json gives the width of an MLP.

    Raises:
        UserError: another activation function, or a value that is not of its type.
        KeyError: config.json lacks a size.
    """
    found = hf_config[activation_key]
    if found != activation:
        raise UserError(
            f"{activation_key} {shown(found)} is not supported for {architecture(hf_config)}; known: {activation}"
        )
    heads, hidden = size(hf_config, "num_attention_heads"), size(hf_config, "hidden_size")
    groups = optional_size(hf_config, "num_key_value_heads") or heads
    if heads % groups:
        refuse(hf_config, "num_key_value_heads", f"a divisor of num_attention_heads, {heads}")
    head_dim = optional_size(hf_config, "head_dim") or hidden // heads
    if head_dim == 0 or head_dim % 2:
        refuse(
            hf_config,
            "head_dim",
            f"even, for rotary embeddings; hidden_size / num_attention_heads is {hidden // heads}",
        )
    dropout = number(hf_config, "attention_dropout", "a number from 0 on and below 1", zero=True)
    if dropout >= 1:
        refuse(hf_config, "attention_dropout", "a number from 0 on and below 1")
    return {
        "num_layers": size(hf_config, "num_hidden_layers", most=MAX_LAYERS),
        "hidden_size": hidden,
        "ffn_hidden_size": size(hf_config, ffn),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": head_dim,
        "vocab_size": size(hf_config, "vocab_size"),
        "seq_length": size(hf_config, "max_position_embeddings"),
        "share_embeddings_and_output_weights": switch(hf_config, "tie_word_embeddings"),
        "normalization": "RMSNorm",
        "layernorm_epsilon": number(hf_config, "rms_norm_eps"),
        "init_method_std": number(hf_config, "initializer_range", "a number from 0 on", zero=True),
        "activation": activation,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "attention_dropout": dropout,
        "hidden_dropout": 0.0,
    }


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
    """Which layers slide: config.json's ``layer_types``, or the architecture's rule where it has none.

    Raises:
        UserError: not one known type for each layer.
    """
    types = hf_config.get("layer_types")
    if types is None:
        return list(otherwise)
    if not isinstance(types, list) or len(types) != len(otherwise) or any(t not in LAYER_TYPES for t in types):
        refuse(hf_config, "layer_types", f"null or num_hidden_layers, {len(otherwise)}, of {' and '.join(LAYER_TYPES)}")
    return [t == "sliding_attention" for t in types]


def refuse_options(hf_config: dict, *options: str) -> None:
    """Raises :class:`UserError` if config.json turns one of ``options`` on: no map has parameters for it."""
    for option in options:
        if switch(hf_config, option):
            raise UserError(f"{option}: true is not supported for {architecture(hf_config)}")


def architecture(hf_config: dict) -> str:
    return hf_config["architectures"][0]
