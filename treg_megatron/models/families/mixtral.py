"""Mixtral: Mistral's attention, and a mixture of experts instead of the MLP."""

from typing import Any

from treg_megatron.models.families.decoder import ATTENTION, ATTENTION_NORM
from treg_megatron.models.families.experts import mixture, router_fields
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import decoder_fields, optional_size, window_fields
from treg_megatron.models.families.rotary import rope_fields


@register
class Mixtral(Family):
    architecture = "MixtralForCausalLM"
    layer = (ATTENTION_NORM, *ATTENTION, *mixture("model.layers.{layer}.block_sparse_moe", "w1", "w3", "w2"))
    defaults = {
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }

    def fields(self, hf_config: dict) -> dict[str, Any]:
        fields = decoder_fields(hf_config)
        return (
            fields
            | rope_fields(hf_config, fields, theta=1e6)
            | window_fields(optional_size(hf_config, "sliding_window"), [True] * fields["num_layers"])
            | router_fields(hf_config, "num_local_experts")
        )

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm
        from nemo.collections.llm.gpt.model.mixtral import MixtralConfig

        return MixtralConfig, llm.MixtralModel
