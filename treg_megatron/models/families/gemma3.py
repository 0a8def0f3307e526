"""Gemma 3, the text model: Gemma 2's norms, a norm on each query and key head, and two rotary embeddings."""

from typing import Any

from treg_megatron.models.families.decoder import ATTENTION, ATTENTION_NORM, MLP, QK_NORMS, mlp_norm
from treg_megatron.models.families.family import Family, register
from treg_megatron.models.families.fields import (
    decoder_fields,
    number,
    optional_number,
    refuse,
    refuse_options,
    size,
    sliding_layers,
    window_fields,
)
from treg_megatron.models.families.gemma2 import POST_NORMS
from treg_megatron.models.families.rotary import base, local_rope_settings, rope_fields


@register
class Gemma3(Family):
    architecture = "Gemma3ForCausalLM"
    layer = (ATTENTION_NORM, *ATTENTION, *QK_NORMS, mlp_norm("pre_feedforward_layernorm"), *MLP, *POST_NORMS)
    post_layer_norms = True
    defaults = {
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "tie_word_embeddings": True,
    }

    def fields(self, hf_config: dict) -> dict[str, Any]:
        refuse_options(hf_config, "attention_bias", "use_bidirectional_attention")
        if hf_config["attn_logit_softcapping"] is not None:
            refuse(hf_config, "attn_logit_softcapping", "null: transformers does not compute it")
        fields = decoder_fields(hf_config, "gelu_pytorch_tanh", "hidden_activation")
        fields["kv_channels"] = size(hf_config, "head_dim")
        every = size(hf_config, "sliding_window_pattern")
        sliding = sliding_layers(hf_config, [(layer + 1) % every > 0 for layer in range(fields["num_layers"])])
        rotary = rope_fields(hf_config, fields, theta=1e6, known=("default", "linear"), layers="full_attention")
        if "type" in (hf_config.get("rope_scaling") or {}):
            refuse(hf_config, "rope_scaling", "null or a table with rope_type; transformers does not load type")
        local = local_rope_settings(hf_config)
        return (
            fields
            | rotary
            | window_fields(size(hf_config, "sliding_window"), sliding)
            | {
                "local_rotary_base": base(local, "rope_local_base_freq"),
                "layernorm_zero_centered_gamma": True,
                "qk_layernorm": True,
                "query_pre_attn_scalar": number(hf_config, "query_pre_attn_scalar"),
                "attn_logit_softcapping": None,
                "final_logit_softcapping": optional_number(hf_config, "final_logit_softcapping"),
            }
        )

    def nemo_classes(self, hf_config: dict) -> tuple[type, type]:
        from nemo.collections import llm

        # its Gemma3Config takes no context parallelism; Gemma 2's embedding is scaled alike
        return llm.Gemma2Config, llm.Gemma2Model
