"""Qwen 2 and 2.5: a bias on query, key and value."""

from typing import Any

from treg_megatron.models.families.decoder import ATTENTION, ATTENTION_NORM, MLP, QKV_BIAS, mlp_norm
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import decoder_fields, rope_fields, sliding_layers, window_fields


def qwen_window_fields(hf_config: dict, layers: int) -> dict[str, Any]:
    """Qwen's sliding window, off in every published model: the layers from ``max_window_layers`` on."""
    window = hf_config.get("sliding_window", 4096) if hf_config.get("use_sliding_window") else None
    first = hf_config.get("max_window_layers", 28)
    return window_fields(window, sliding_layers(hf_config, [layer >= first for layer in range(layers)]))


@register
class Qwen2(Family):
    architecture = "Qwen2ForCausalLM"
    layer = (ATTENTION_NORM, *ATTENTION, QKV_BIAS, mlp_norm("post_attention_layernorm"), *MLP)

    def fields(self, hf_config: dict) -> dict[str, Any]:
        fields = decoder_fields(hf_config) | rope_fields(hf_config)
        return fields | qwen_window_fields(hf_config, fields["num_layers"]) | {"add_qkv_bias": True}

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm

        return llm.Qwen2Config, llm.Qwen2Model
