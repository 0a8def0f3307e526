"""config.json of published models and the model fields derived from them."""

import math

import pytest

from tests.unit.test_config_corpus import PUBLISHED as CORPUS
from treg_megatron.errors import UserError
from treg_megatron.models.architecture import PUBLISHED
from treg_megatron.models.families import (
    FAMILIES,
    family_of,
    in_model_order,
    model_fields,
    source_shape,
    stacked_shape,
)
from treg_megatron.utils.files import read_json

MISTRAL_7B_V1 = {
    "architectures": ["MistralForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
MISTRAL_NEMO_12B = MISTRAL_7B_V1 | {
    "head_dim": 128,
    "hidden_size": 5120,
    "max_position_embeddings": 1024000,
    "num_hidden_layers": 40,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 131072,
}
QWEN25_HALF_B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
GEMMA2_9B, MIXTRAL_8X7B, LLAMA3_70B, LLAMA31_405B = (
    read_json(PUBLISHED / f"{name}.json") for name in ("gemma2_9b", "mixtral_8x7b", "llama3_70b", "llama3.1_405b")
)
# counted from the safetensors files that the authors publish
PARAMETERS = [
    (MISTRAL_7B_V1, 7_241_732_096),
    (MISTRAL_NEMO_12B, 12_247_782_400),
    (QWEN25_HALF_B, 494_032_768),
    (QWEN3_8B, 8_190_735_360),
    (GEMMA2_9B, 9_241_705_984),
    (MIXTRAL_8X7B, 46_702_792_704),
    (LLAMA3_70B, 70_553_706_496),
    (LLAMA31_405B, 405_853_388_800),
    (CORPUS["Mistral-Small-24B-2501"], 23_572_403_200),
    (CORPUS["Mixtral-8x22B-v0.1"], 140_620_634_112),
    (CORPUS["Mixtral-8x22B-Instruct-v0.1"], 140_630_071_296),
    (CORPUS["Qwen3-30B-A3B"], 30_532_122_624),
    (CORPUS["Qwen3-235B-A22B"], 235_093_634_560),
    (CORPUS["Qwen3-Coder-480B-A35B-Instruct"], 480_154_875_392),
    (CORPUS["Phi-3-mini-4k-instruct"], 3_821_079_552),
    (CORPUS["Phi-3-medium-4k-instruct"], 13_960_238_080),
    (CORPUS["phi-4"], 14_659_507_200),
    (CORPUS["gemma-3-270m"], 268_098_176),
    (CORPUS["gemma-3-1b"], 999_885_952),
    # without the vision tower, which is the same in all three, and the projection of its outputs into the text model
    *(
        (CORPUS[f"gemma-3-{size}, text"], published - 416_866_032 - 1152 * (hidden + 1))
        for size, hidden, published in (
            ("4b", 2560, 4_300_079_472),
            ("12b", 3840, 12_187_325_040),
            ("27b", 5376, 27_432_406_640),
        )
    ),
]


@pytest.mark.parametrize("config, parameters", PARAMETERS, ids=[c["architectures"][0] for c, _ in PARAMETERS])
def test_the_map_holds_every_parameter_of_the_published_model(config, parameters):
    family, fields = family_of(config), model_fields(config)
    in_folder = sum(
        math.prod(source_shape(source, fields))
        for parameter, _ in in_model_order(family, fields)
        for source in parameter.sources
    )
    in_checkpoint = sum(math.prod(stacked_shape(parameter, fields)) for parameter in family.parameters(fields))
    assert in_folder == in_checkpoint == parameters


def test_window_counts_the_tokens_before_the_token():
    assert model_fields(MISTRAL_7B_V1)["window_size"] == (4095, 0)
    assert "window_attn_skip_freq" not in model_fields(MISTRAL_7B_V1)


def test_no_window_overrides_nemos_default():
    for config in (MISTRAL_NEMO_12B, QWEN25_HALF_B, QWEN3_8B, MIXTRAL_8X7B):
        assert model_fields(config)["window_size"] is None


def test_gemma_2_slides_in_every_other_layer_from_the_first():
    fields = model_fields(GEMMA2_9B)
    assert fields["window_size"] == (4095, 0)
    assert fields["window_attn_skip_freq"] == [1, 0] * 21
    types = ["full_attention"] * 41 + ["sliding_attention"]
    assert model_fields(GEMMA2_9B | {"layer_types": types})["window_attn_skip_freq"] == [0] * 41 + [1]


def test_gemma_2_fields():
    fields = model_fields(GEMMA2_9B)
    assert fields["share_embeddings_and_output_weights"] is True
    assert (fields["activation"], fields["kv_channels"]) == ("gelu_pytorch_tanh", 256)
    assert fields["layernorm_zero_centered_gamma"] is True
    assert [fields[k] for k in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")] == [
        256,
        50.0,
        30.0,
    ]


def test_qwen_slides_from_max_window_layers_on_where_it_slides():
    fields = model_fields(QWEN25_HALF_B | {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 64})
    assert (fields["window_size"], fields["window_attn_skip_freq"]) == ((63, 0), [0] * 20 + [1] * 4)


def test_experts_are_stacked_behind_layers():
    family, fields = FAMILIES["MixtralForCausalLM"], model_fields(MIXTRAL_8X7B)
    shapes = {p.key: stacked_shape(p, fields) for p in family.parameters(fields)}
    assert shapes["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (32, 8, 2 * 14336, 4096)
    assert shapes["decoder.layers.mlp.experts.experts.linear_fc2.weight"] == (32, 8, 4096, 14336)
    assert shapes["decoder.layers.mlp.router.weight"] == (32, 8, 4096)
    assert shapes["decoder.layers.pre_mlp_layernorm.weight"] == (32, 4096)


@pytest.mark.parametrize(
    "config, change, said",
    [
        (
            GEMMA2_9B,
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            "'yarn' is not supported for Gemma2ForCausalLM",
        ),
        (
            CORPUS["phi-4"],
            {"rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}},
            "'longrope' is not supported for Phi3ForCausalLM; known: default",
        ),
        (CORPUS["phi-4"], {"resid_pdrop": 0.1}, "resid_pdrop is 0.1, which should be 0"),
        (CORPUS["phi-4"], {"partial_rotary_factor": 0.51}, "up to 1, and an even part of 128 channels"),
        (CORPUS["Qwen3-30B-A3B"], {"mlp_only_layers": [0]}, "mlp_only_layers is .* all must have experts"),
        (CORPUS["Qwen3-30B-A3B"], {"decoder_sparse_step": 2}, "decoder_sparse_step is 2, which should be 1"),
        (CORPUS["Qwen3-30B-A3B"], {"num_experts_per_tok": 1}, "should be at least 2"),
        (CORPUS["gemma-3-1b"], {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (CORPUS["gemma-3-1b"], {"use_bidirectional_attention": True}, "use_bidirectional_attention: true"),
        (CORPUS["gemma-3-1b"], {"architectures": ["Gemma3ForConditionalGeneration"]}, "save its language model alone"),
        (QWEN3_8B, {"attention_bias": True}, "attention_bias: true is not supported for Qwen3ForCausalLM"),
        (GEMMA2_9B, {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        (
            MIXTRAL_8X7B,
            {"hidden_act": "gelu"},
            "hidden_act 'gelu' is not supported for MixtralForCausalLM; known: silu",
        ),
    ],
)
def test_what_is_not_supported_is_refused(config, change, said):
    with pytest.raises(UserError, match=said):
        model_fields(config | change)


@pytest.mark.parametrize(
    "config, key",
    [(GEMMA2_9B, "hidden_size"), (QWEN3_8B, "num_hidden_layers"), (MIXTRAL_8X7B, "num_local_experts")],
)
def test_a_size_that_config_json_lacks_is_named(config, key):
    with pytest.raises(UserError, match=f"config.json of a {config['architectures'][0]} lacks '{key}'"):
        model_fields({k: v for k, v in config.items() if k != key})


@pytest.mark.parametrize(
    "config, key, field, default",
    [
        (GEMMA2_9B, "query_pre_attn_scalar", "query_pre_attn_scalar", 256),
        (GEMMA2_9B, "head_dim", "kv_channels", 256),
        (QWEN3_8B, "head_dim", "kv_channels", 128),
        (MISTRAL_7B_V1, "num_key_value_heads", "num_query_groups", 8),
        (MIXTRAL_8X7B, "rms_norm_eps", "layernorm_epsilon", 1e-5),
        (MIXTRAL_8X7B, "rope_theta", "rotary_base", 1_000_000),
        (CORPUS["Qwen3-30B-A3B"], "norm_topk_prob", "moe_router_pre_softmax", True),
        (CORPUS["Qwen3-30B-A3B"], "head_dim", "kv_channels", 64),
        (CORPUS["gemma-3-1b"], "rope_theta", "rotary_base", 1_000_000),
        (CORPUS["gemma-3-1b"], "rope_local_base_freq", "local_rotary_base", 10_000),
    ],
)
def test_what_config_json_lacks_has_transformers_default(config, key, field, default):
    assert model_fields({k: v for k, v in config.items() if k != key})[field] == default


@pytest.mark.parametrize("config", [GEMMA2_9B, QWEN3_8B])
def test_null_is_not_absent(config):
    with pytest.raises(UserError, match="head_dim is null, which should be a whole number"):
        model_fields(config | {"head_dim": None})


@pytest.mark.parametrize("names", ["LlamaForCausalLM", {"LlamaForCausalLM": 1}, [["LlamaForCausalLM"]]])
def test_architectures_that_is_no_list_of_names_is_refused(names):
    with pytest.raises(UserError, match="architectures in config.json is .* it must be a list, such as"):
        model_fields(LLAMA3_70B | {"architectures": names})
