"""Phi 3 and 4: one tensor for query, key and value, and one for gate and up."""

from typing import Any

from treg_megatron.models.families.decoder import ATTENTION_NORM, mlp_norm
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import decoder_fields, number, optional_size, refuse, window_fields
from treg_megatron.models.families.parameters import HFTensor, Parameter
from treg_megatron.models.families.rotary import rope_fields


@register
class Phi3(Family):
    architecture = "Phi3ForCausalLM"
    layer = (
        ATTENTION_NORM,
        Parameter(
            "decoder.layers.{layer}.self_attention.linear_qkv.weight",
            (HFTensor("model.layers.{layer}.self_attn.qkv_proj.weight", "query+kv+kv hidden"),),
            groups="num_query_groups",
        ),
        Parameter(
            "decoder.layers.{layer}.self_attention.linear_proj.weight",
            (HFTensor("model.layers.{layer}.self_attn.o_proj.weight", "hidden query"),),
        ),
        mlp_norm("post_attention_layernorm"),
        Parameter(
            "decoder.layers.{layer}.mlp.linear_fc1.weight",
            (HFTensor("model.layers.{layer}.mlp.gate_up_proj.weight", "ffn+ffn hidden"),),
        ),
        Parameter(
            "decoder.layers.{layer}.mlp.linear_fc2.weight",
            (HFTensor("model.layers.{layer}.mlp.down_proj.weight", "hidden ffn"),),
        ),
    )
    defaults = {
        "max_position_embeddings": 4096,
        "partial_rotary_factor": 1.0,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
    }

    def fields(self, hf_config: dict) -> dict[str, Any]:
        if number(hf_config, "resid_pdrop", "0", zero=True):
            refuse(hf_config, "resid_pdrop", "0: Megatron would drop embeddings too")
        fields = decoder_fields(hf_config)
        rotary = rope_fields(hf_config, fields, known=("default",), partial=True)
        if hf_config.get("rope_scaling") is not None:
            refuse(hf_config, "rope_scaling", "null, as transformers takes no table for it but longrope's")
        return (
            fields | rotary | window_fields(optional_size(hf_config, "sliding_window"), [True] * fields["num_layers"])
        )

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm

        return llm.Phi3Config, llm.Phi3Model
