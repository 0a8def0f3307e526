"""Qwen 3 (dense): a norm on each query and key head instead of Qwen 2's biases."""

from typing import Any

from treg_megatron.models.families.decoder import ATTENTION, ATTENTION_NORM, MLP, QK_NORMS, mlp_norm
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import decoder_fields, refuse_options, size
from treg_megatron.models.families.qwen2 import QWEN_DEFAULTS, qwen_window_fields
from treg_megatron.models.families.rotary import rope_fields


@register
class Qwen3(Family):
    architecture = "Qwen3ForCausalLM"
    layer = (ATTENTION_NORM, *ATTENTION, *QK_NORMS, mlp_norm("post_attention_layernorm"), *MLP)
    defaults = {**QWEN_DEFAULTS, "head_dim": 128}

    def fields(self, hf_config: dict) -> dict[str, Any]:
        refuse_options(hf_config, "attention_bias")
        fields = decoder_fields(hf_config) | {"kv_channels": size(hf_config, "head_dim")}
        return (
            fields
            | rope_fields(hf_config, fields)
            | qwen_window_fields(hf_config, fields["num_layers"])
            | {"add_qkv_bias": False, "qk_layernorm": True}
        )

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm

        return llm.Qwen3Config, llm.Qwen3Model
