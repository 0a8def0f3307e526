"""Mistral: Llama's parameters; the first version has a sliding window in every layer."""

from typing import Any

from treg_megatron.models.families.decoder import LLAMA_LAYER
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import decoder_fields, optional_size, window_fields
from treg_megatron.models.families.rotary import rope_fields


@register
class Mistral(Family):
    architecture = "MistralForCausalLM"
    layer = LLAMA_LAYER
    defaults = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}

    def fields(self, hf_config: dict) -> dict[str, Any]:
        fields = decoder_fields(hf_config)
        return (
            fields
            | rope_fields(hf_config, fields)
            | window_fields(optional_size(hf_config, "sliding_window"), [True] * fields["num_layers"])
        )

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm

        return llm.MistralConfig7B, llm.MistralModel
