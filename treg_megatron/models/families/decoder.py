"""Parameter-map entries shared by several architectures."""

import dataclasses

from treg_megatron.models.families.parameters import HFTensor, Parameter

EMBEDDING = Parameter("embedding.word_embeddings.weight", (HFTensor("model.embed_tokens.weight", "vocab hidden"),))
FINAL_NORM = Parameter("decoder.final_layernorm.weight", (HFTensor("model.norm.weight", "hidden"),))
OUTPUT_LAYER = Parameter("output_layer.weight", (HFTensor("lm_head.weight", "vocab hidden"),))

ATTENTION_NORM = Parameter(
    "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
    (HFTensor("model.layers.{layer}.input_layernorm.weight", "hidden"),),
    local_name="decoder.layers.{layer}.input_layernorm.weight",
)

ATTENTION = (
    Parameter(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        (
            HFTensor("model.layers.{layer}.self_attn.q_proj.weight", "query hidden"),
            HFTensor("model.layers.{layer}.self_attn.k_proj.weight", "kv hidden"),
            HFTensor("model.layers.{layer}.self_attn.v_proj.weight", "kv hidden"),
        ),
        groups="num_query_groups",
    ),
    Parameter(
        "decoder.layers.{layer}.self_attention.linear_proj.weight",
        (HFTensor("model.layers.{layer}.self_attn.o_proj.weight", "hidden query"),),
    ),
)

QKV_BIAS = Parameter(
    "decoder.layers.{layer}.self_attention.linear_qkv.bias",
    (
        HFTensor("model.layers.{layer}.self_attn.q_proj.bias", "query"),
        HFTensor("model.layers.{layer}.self_attn.k_proj.bias", "kv"),
        HFTensor("model.layers.{layer}.self_attn.v_proj.bias", "kv"),
    ),
    groups="num_query_groups",
)

#: biases of all linear layers, in models that have them
LINEAR_BIASES = tuple(
    dataclasses.replace(bias, only_if="add_bias_linear")
    for bias in (
        QKV_BIAS,
        Parameter(
            "decoder.layers.{layer}.self_attention.linear_proj.bias",
            (HFTensor("model.layers.{layer}.self_attn.o_proj.bias", "hidden"),),
        ),
        Parameter(
            "decoder.layers.{layer}.mlp.linear_fc1.bias",
            (
                HFTensor("model.layers.{layer}.mlp.gate_proj.bias", "ffn"),
                HFTensor("model.layers.{layer}.mlp.up_proj.bias", "ffn"),
            ),
        ),
        Parameter(
            "decoder.layers.{layer}.mlp.linear_fc2.bias",
            (HFTensor("model.layers.{layer}.mlp.down_proj.bias", "hidden"),),
        ),
    )
)

QK_NORMS = (
    Parameter(
        "decoder.layers.{layer}.self_attention.q_layernorm.weight",
        (HFTensor("model.layers.{layer}.self_attn.q_norm.weight", "head"),),
    ),
    Parameter(
        "decoder.layers.{layer}.self_attention.k_layernorm.weight",
        (HFTensor("model.layers.{layer}.self_attn.k_norm.weight", "head"),),
    ),
)


def mlp_norm(hf_name: str) -> Parameter:
    """The norm before a dense MLP, whose Hugging Face name differs between architectures."""
    return Parameter(
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        (HFTensor(f"model.layers.{{layer}}.{hf_name}.weight", "hidden"),),
        local_name="decoder.layers.{layer}.pre_mlp_layernorm.weight",
    )


MLP = (
    Parameter(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        (
            HFTensor("model.layers.{layer}.mlp.gate_proj.weight", "ffn hidden"),
            HFTensor("model.layers.{layer}.mlp.up_proj.weight", "ffn hidden"),
        ),
    ),
    Parameter(
        "decoder.layers.{layer}.mlp.linear_fc2.weight",
        (HFTensor("model.layers.{layer}.mlp.down_proj.weight", "hidden ffn"),),
    ),
)

LLAMA_LAYER = (ATTENTION_NORM, *ATTENTION, mlp_norm("post_attention_layernorm"), *MLP)
