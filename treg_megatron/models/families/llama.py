"""Llama 2, 3, 3.1, 3.2, and the many models that share its architecture; some have a bias on every linear layer."""

from typing import Any

from treg_megatron.models.families.decoder import LINEAR_BIASES, LLAMA_LAYER
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import decoder_fields, refuse, switch
from treg_megatron.models.families.rotary import rope_fields, rope_settings


@register
class Llama(Family):
    architecture = "LlamaForCausalLM"
    layer = (*LLAMA_LAYER, *LINEAR_BIASES)

    def fields(self, hf_config: dict) -> dict[str, Any]:
        attention, mlp = switch(hf_config, "attention_bias"), switch(hf_config, "mlp_bias")
        if attention != mlp:
            refuse(hf_config, "attention_bias", f"the same as mlp_bias, {mlp}: Megatron has both biases or neither")
        fields = decoder_fields(hf_config) | {"add_bias_linear": attention}
        return fields | rope_fields(hf_config, fields, known=("default", "linear", "dynamic", "llama3", "yarn"))

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm
        from nemo.collections.llm.gpt.model.llama import Llama31Config

        scaled = rope_settings(hf_config)["rope_type"] == "llama3"
        return Llama31Config if scaled else llm.LlamaConfig, llm.LlamaModel
