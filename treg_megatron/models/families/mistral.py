"""Mistral: Llama's parameters; the first version has a sliding window in every layer."""

from typing import Any

from treg_megatron.models.families.decoder import LLAMA_LAYER
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import decoder_fields, rope_fields, window_fields


@register
class Mistral(Family):
    architecture = "MistralForCausalLM"
    layer = LLAMA_LAYER

    def fields(self, hf_config: dict) -> dict[str, Any]:
        fields = decoder_fields(hf_config) | rope_fields(hf_config)
        # an absent key means 4096 to transformers, null means none
        return fields | window_fields(hf_config.get("sliding_window", 4096), [True] * fields["num_layers"])

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm

        return llm.MistralConfig7B, llm.MistralModel
