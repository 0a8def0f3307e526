"""Qwen 2 and 2.5: a bias on query, key and value."""

from typing import Any

from treg_megatron.models.families.decoder import ATTENTION, ATTENTION_NORM, MLP, QKV_BIAS, mlp_norm
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import (
    decoder_fields,
    optional_size,
    refuse,
    size,
    sliding_layers,
    switch,
    window_fields,
)
from treg_megatron.models.families.rotary import rope_fields

QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
}


def qwen_window_fields(hf_config: dict, layers: int) -> dict[str, Any]:
    """Qwen's sliding window, in the layers from ``max_window_layers`` on; no published model turns it on."""
    window = optional_size(hf_config, "sliding_window") if switch(hf_config, "use_sliding_window") else None
    first = size(hf_config, "max_window_layers", least=0) if window else layers
    sliding = sliding_layers(hf_config, [layer >= first for layer in range(layers)])
    if any(sliding) and window is None:
        refuse(hf_config, "layer_types", "without sliding_attention, as use_sliding_window or sliding_window is off")
    return window_fields(window, sliding)


@register
class Qwen2(Family):
    architecture = "Qwen2ForCausalLM"
    layer = (ATTENTION_NORM, *ATTENTION, QKV_BIAS, mlp_norm("post_attention_layernorm"), *MLP)
    defaults = QWEN_DEFAULTS

    def fields(self, hf_config: dict) -> dict[str, Any]:
        fields = decoder_fields(hf_config)
        return (
            fields
            | rope_fields(hf_config, fields)
            | qwen_window_fields(hf_config, fields["num_layers"])
            | {"add_qkv_bias": True}
        )

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm

        return llm.Qwen2Config, llm.Qwen2Model
