"""Mixtral: Mistral's attention, and a mixture of experts instead of the MLP."""

from typing import Any

from treg_megatron.models.families.decoder import ATTENTION, ATTENTION_NORM
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import decoder_fields, optional_size, refuse, size, window_fields
from treg_megatron.models.families.parameters import HFTensor, Parameter
from treg_megatron.models.families.rotary import rope_fields

EXPERTS = "model.layers.{layer}.block_sparse_moe"

MOE = (
    # Megatron never fuses the norm before experts: module and checkpoint key have this name under every layer spec
    Parameter(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        (HFTensor("model.layers.{layer}.post_attention_layernorm.weight", "hidden"),),
    ),
    Parameter("decoder.layers.{layer}.mlp.router.weight", (HFTensor(f"{EXPERTS}.gate.weight", "experts hidden"),)),
    Parameter(
        "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc1.weight",
        (
            HFTensor(f"{EXPERTS}.experts.{{expert}}.w1.weight", "ffn hidden"),
            HFTensor(f"{EXPERTS}.experts.{{expert}}.w3.weight", "ffn hidden"),
        ),
    ),
    Parameter(
        "decoder.layers.{layer}.mlp.experts.local_experts.{expert}.linear_fc2.weight",
        (HFTensor(f"{EXPERTS}.experts.{{expert}}.w2.weight", "hidden ffn"),),
    ),
)


@register
class Mixtral(Family):
    architecture = "MixtralForCausalLM"
    layer = (ATTENTION_NORM, *ATTENTION, *MOE)
    defaults = {
        "max_position_embeddings": 131072,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }

    def fields(self, hf_config: dict) -> dict[str, Any]:
        fields = decoder_fields(hf_config)
        experts, chosen = size(hf_config, "num_local_experts"), size(hf_config, "num_experts_per_tok")
        if chosen > experts:
            refuse(hf_config, "num_experts_per_tok", f"at most num_local_experts, {experts}")
        return (
            fields
            | rope_fields(hf_config, fields, theta=1e6)
            | window_fields(optional_size(hf_config, "sliding_window"), [True] * fields["num_layers"])
            | {
                "num_moe_experts": experts,
                "moe_router_topk": chosen,
                "moe_router_pre_softmax": False,
                "moe_router_load_balancing_type": "aux_loss",
                "moe_aux_loss_coeff": 0.0,  # the recipe's, in training: build.policy_config
            }
        )

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm
        from nemo.collections.llm.gpt.model.mixtral import MixtralConfig

        return MixtralConfig, llm.MixtralModel
