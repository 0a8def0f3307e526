"""Gemma 2: norms after attention and MLP too, soft-capped scores and logits, sliding windows in every other layer."""

from typing import Any

from treg_megatron.models.families.decoder import ATTENTION, ATTENTION_NORM, MLP, mlp_norm
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import (
    decoder_fields,
    number,
    optional_number,
    refuse_options,
    size,
    sliding_layers,
    window_fields,
)
from treg_megatron.models.families.parameters import HFTensor, Parameter
from treg_megatron.models.families.rotary import rope_fields

POST_NORMS = (
    Parameter(
        "decoder.layers.{layer}.self_attention.linear_proj.post_layernorm.weight",
        (HFTensor("model.layers.{layer}.post_attention_layernorm.weight", "hidden"),),
    ),
    Parameter(
        "decoder.layers.{layer}.mlp.linear_fc2.post_layernorm.weight",
        (HFTensor("model.layers.{layer}.post_feedforward_layernorm.weight", "hidden"),),
    ),
)


@register
class Gemma2(Family):
    architecture = "Gemma2ForCausalLM"
    layer = (ATTENTION_NORM, *ATTENTION, mlp_norm("pre_feedforward_layernorm"), *MLP, *POST_NORMS)
    post_layer_norms = True
    defaults = {
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    }

    def fields(self, hf_config: dict) -> dict[str, Any]:
        refuse_options(hf_config, "attention_bias")
        fields = decoder_fields(hf_config, "gelu_pytorch_tanh", "hidden_activation")
        sliding = sliding_layers(hf_config, [layer % 2 == 0 for layer in range(fields["num_layers"])])
        return (
            fields
            | rope_fields(hf_config, fields, known=("default",))
            | window_fields(size(hf_config, "sliding_window"), sliding)
            | {
                "kv_channels": size(hf_config, "head_dim"),
                "layernorm_zero_centered_gamma": True,
                "query_pre_attn_scalar": number(hf_config, "query_pre_attn_scalar"),
                **{
                    key: optional_number(hf_config, key)
                    for key in ("attn_logit_softcapping", "final_logit_softcapping")
                },
            }
        )

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm

        return llm.Gemma2Config, llm.Gemma2Model
