"""Qwen 3 with a mixture of experts in every layer."""

from typing import Any

from treg_megatron.models.families.decoder import ATTENTION, ATTENTION_NORM, QK_NORMS
from treg_megatron.models.families.experts import mixture, router_fields
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import (
    decoder_fields,
    optional_size,
    refuse,
    refuse_options,
    size,
    switch,
    window_fields,
)
from treg_megatron.models.families.rotary import rope_fields

ALL_SPARSE = "as a checkpoint stacks its layers, all must have experts"


@register
class Qwen3Moe(Family):
    architecture = "Qwen3MoeForCausalLM"
    layer = (
        ATTENTION_NORM,
        *ATTENTION,
        *QK_NORMS,
        *mixture("model.layers.{layer}.mlp", "gate_proj", "up_proj", "down_proj"),
    )
    defaults = {
        "decoder_sparse_step": 1,
        "max_position_embeddings": 32768,
        "mlp_only_layers": None,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
    }

    def fields(self, hf_config: dict) -> dict[str, Any]:
        refuse_options(hf_config, "attention_bias")
        if size(hf_config, "decoder_sparse_step") != 1:
            refuse(hf_config, "decoder_sparse_step", f"1: {ALL_SPARSE}")
        if hf_config["mlp_only_layers"] not in (None, []):
            refuse(hf_config, "mlp_only_layers", f"null or empty: {ALL_SPARSE}")
        # intermediate_size is that of layers without experts, of which there are none
        fields = decoder_fields(hf_config, ffn="moe_intermediate_size")
        window = optional_size(hf_config, "sliding_window") if switch(hf_config, "use_sliding_window") else None
        return (
            fields
            | rope_fields(hf_config, fields)
            | window_fields(window, [True] * fields["num_layers"])
            | router_fields(hf_config, "num_experts", normalised=switch(hf_config, "norm_topk_prob"))
            | {"add_qkv_bias": False, "qk_layernorm": True}
        )

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm
        from nemo.collections.llm.gpt.model.qwen3 import Qwen3MoEConfig

        return Qwen3MoEConfig, llm.Qwen3Model
