"""Llama 2, 3, 3.1, 3.2, and the many models that share its architecture."""

from typing import Any

from treg_megatron.models.families.decoder import LLAMA_LAYER
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import (
    decoder_fields,
    number,
    refuse,
    refuse_options,
    rope_fields,
    rope_settings,
    size,
)


@register
class Llama(Family):
    architecture = "LlamaForCausalLM"
    layer = LLAMA_LAYER

    def fields(self, hf_config: dict) -> dict[str, Any]:
        refuse_options(hf_config, "attention_bias", "mlp_bias")
        fields = decoder_fields(hf_config) | rope_fields(hf_config, known=("default", "llama3"))
        rope = {"architectures": [self.architecture], **rope_settings(hf_config)}
        if rope["rope_type"] == "default":
            return fields
        low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
        if low >= high:
            refuse(rope, "high_freq_factor", f"above low_freq_factor, {low}")
        return fields | {
            "scale_factor": number(rope, "factor"),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "old_context_len": size(rope, "original_max_position_embeddings"),
        }

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm
        from nemo.collections.llm.gpt.model.llama import Llama31Config

        scaled = rope_settings(hf_config)["rope_type"] != "default"
        return Llama31Config if scaled else llm.LlamaConfig, llm.LlamaModel
