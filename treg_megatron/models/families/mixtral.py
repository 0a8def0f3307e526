"""Mixtral: Mistral's attention, and experts for an MLP."""

from typing import Any

from treg_megatron.models.families.decoder import ATTENTION, ATTENTION_NORM
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import decoder_fields, rope_fields, window_fields
from treg_megatron.models.families.parameters import HFTensor, Parameter

EXPERTS = "model.layers.{layer}.block_sparse_moe"

MOE = (
    # before experts Megatron has no fused norm: it keeps this module, and its name as the key, under every spec
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

    def fields(self, hf_config: dict) -> dict[str, Any]:
        fields = decoder_fields(hf_config) | rope_fields(hf_config)
        return (
            fields
            | window_fields(hf_config.get("sliding_window"), [True] * fields["num_layers"])
            | {
                "num_moe_experts": hf_config["num_local_experts"],
                "moe_router_topk": hf_config["num_experts_per_tok"],
                "moe_router_load_balancing_type": "aux_loss",
                "moe_aux_loss_coeff": 0.0,  # the recipe's, in training: build.policy_config
            }
        )

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm
        from nemo.collections.llm.gpt.model.mixtral import MixtralConfig

        return MixtralConfig, llm.MixtralModel
