"""The parameter map: invertible layouts, fields that match config.json, and refusals that list what is supported."""

import pytest
import torch

from treg_megatron.errors import UserError
from treg_megatron.models.families import (
    FAMILIES,
    Interleaving,
    block_rows,
    model_fields,
    parameter_shape,
    source_shape,
    source_views,
)

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "rms_norm_eps": 1e-05,
    "vocab_size": 32000,
}


def merge(layout: Interleaving, tensors: list[torch.Tensor]) -> torch.Tensor:
    merged = tensors[0].new_empty(sum(len(t) for t in tensors), *tensors[0].shape[1:])
    for index, tensor in enumerate(tensors):
        layout.part(merged, index).copy_(tensor.view(layout.part(merged, index).shape))
    return merged


def test_qkv_interleaves_by_query_group():
    # 2 groups, each of 2 query heads, 1 key head and 1 value head; head size 1, so that a row is a head
    query, key, value = torch.tensor([[0], [1], [2], [3]]), torch.tensor([[10], [11]]), torch.tensor([[20], [21]])
    merged = merge(Interleaving(2, [4, 2, 2]), [query, key, value])
    assert merged.flatten().tolist() == [0, 1, 10, 20, 2, 3, 11, 21]


def test_the_blocks_of_one_tensor_are_laid_out_like_tensors():
    """Phi 3 keeps query, key and value in one, where Llama has three."""
    sizes = {"vocab_size": 1, "hidden_size": 3, "ffn_hidden_size": 5, "kv_channels": 2}
    fields = sizes | {"num_attention_heads": 4, "num_query_groups": 2}
    [phi], [llama] = (
        [p for p in FAMILIES[f"{name}ForCausalLM"].layer if p.name.endswith("linear_qkv.weight")]
        for name in ("Phi3", "Llama")
    )
    merged = torch.arange(parameter_shape(phi, fields)[0] * 3).view(-1, 3)
    assert source_shape(phi.sources[0], fields) == merged.shape
    [blocks] = source_views(phi, merged, fields)
    assert [block.numel() // 3 for block in blocks] == block_rows(phi.sources[0], fields) == [8, 4, 4]
    for block, [view] in zip(blocks, source_views(llama, merged, fields), strict=True):
        assert torch.equal(block, view)


def test_one_group_is_concatenation():
    gate, up = torch.tensor([[0], [1]]), torch.tensor([[10], [11]])
    assert merge(Interleaving(1, [2, 2]), [gate, up]).flatten().tolist() == [0, 1, 10, 11]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("width", [(), (5,)], ids=["bias", "weight"])
def test_parts_come_back_out(groups, width):
    tensors = [torch.randn(rows, *width) for rows in (16, 8, 8)]
    layout = Interleaving(groups, [16, 8, 8])
    merged = merge(layout, tensors)
    for index, tensor in enumerate(tensors):
        assert torch.equal(layout.part(merged, index).reshape(tensor.shape), tensor)


def test_fields_of_llama_3_1():
    fields = model_fields(LLAMA_3_1_8B)
    assert fields["kv_channels"] == 128
    assert fields["num_query_groups"] == 8
    assert fields["ffn_hidden_size"] == 14336
    assert fields["vocab_size"] == 128256
    assert fields["share_embeddings_and_output_weights"] is False
    assert (fields["rotary_base"], type(fields["rotary_base"])) == (500000, int)
    assert [fields[k] for k in ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")] == [
        8.0,
        1.0,
        4.0,
        8192,
    ]


def test_fields_of_llama_2_take_transformers_defaults():
    fields = model_fields(LLAMA_2_7B)
    assert fields["num_query_groups"] == 32
    assert fields["rotary_base"] == 10000
    assert "scale_factor" not in fields


def test_the_newer_spelling_of_rotary_settings_is_the_same():
    newer = {k: v for k, v in LLAMA_3_1_8B.items() if not k.startswith("rope_")}
    newer["rope_parameters"] = LLAMA_3_1_8B["rope_scaling"] | {"rope_theta": 500000.0}
    assert model_fields(newer) == model_fields(LLAMA_3_1_8B)


def test_parameter_shapes_of_llama_3_1():
    family, fields = FAMILIES["LlamaForCausalLM"], model_fields(LLAMA_3_1_8B)
    shapes = {p.key: parameter_shape(p, fields) for p in family.parameters(fields)}
    assert shapes["decoder.layers.self_attention.linear_qkv.weight"] == ((32 + 2 * 8) * 128, 4096)
    assert shapes["decoder.layers.mlp.linear_fc1.weight"] == (2 * 14336, 4096)
    assert shapes["output_layer.weight"] == (128256, 4096)


def test_a_tied_model_has_no_output_layer():
    family, fields = FAMILIES["LlamaForCausalLM"], model_fields(LLAMA_3_1_8B | {"tie_word_embeddings": True})
    assert "output_layer.weight" not in {p.key for p in family.parameters(fields)}


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "MambaForCausalLM is not supported; known: LlamaForCausalLM",
        ),
        ({"architectures": None}, "known: LlamaForCausalLM"),
        ({"attention_bias": True}, "attention_bias is True, which should be the same as mlp_bias, False"),
        ({"mlp_bias": True}, "attention_bias is False, which should be the same as mlp_bias, True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
        ({"rope_scaling": {"type": "yarn"}}, "lacks 'factor'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "lacks 'low_freq_factor'"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
    ],
)
def test_what_is_not_supported_is_refused(change, said):
    with pytest.raises(UserError, match=said):
        model_fields(LLAMA_3_1_8B | change)


def test_a_config_without_sizes_is_refused():
    config = {k: v for k, v in LLAMA_2_7B.items() if k != "intermediate_size"}
    with pytest.raises(UserError, match="lacks 'intermediate_size'"):
        model_fields(config)
