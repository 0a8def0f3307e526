"""Hugging Face folders that are not as transformers saves them: read without a loss, or refused in one line."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.hf_folder import CONFIG, hf_folder, random_tensors, read_tensors
from tests.unit.test_conversion import assert_equal
from treg_megatron.checkpoint.compare import compare
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.layout import read_metadata
from treg_megatron.checkpoint.safetensors_stream import tensors_in_folder
from treg_megatron.checkpoint.to_hf import export_checkpoint
from treg_megatron.checkpoint.torch_dist import TorchDistReader
from treg_megatron.errors import UserError
from treg_megatron.models.families import FAMILIES

pytestmark = pytest.mark.slow

NORM = "model.layers.{}.input_layernorm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rewritten(hf: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    return hf


def refused(hf: Path, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        import_checkpoint(hf, hf.parent / "refused")
    assert "\n" not in str(error.value)
    assert not (hf.parent / "refused").exists()


def test_weights_in_one_file_and_in_shards_are_refused(tmp_path):
    hf = hf_folder(tmp_path / "hf", shards=2)
    rewritten(hf, random_tensors(CONFIG, torch.bfloat16))
    refused(hf, "twice, in model.safetensors and in the files that model.safetensors.index.json names")


def test_an_index_of_one_file_is_not_a_second_reading(tmp_path):
    hf = hf_folder(tmp_path / "hf")
    index = {"weight_map": dict.fromkeys(read_tensors(hf), "model.safetensors")}
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    import_checkpoint(hf, tmp_path / "checkpoint")


def test_of_two_shardings_the_one_in_the_index_is_read_and_the_other_named(tmp_path, caplog):
    hf = hf_folder(tmp_path / "hf", shards=2)
    expected = read_tensors(hf)
    save_file({EMBEDDING: torch.zeros(101, 32)}, hf / "model-00001-of-00003.safetensors")
    with caplog.at_level(logging.WARNING):
        import_checkpoint(hf, tmp_path / "checkpoint")
    assert "not reading model-00001-of-00003.safetensors" in caplog.text
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    assert_equal(read_tensors(tmp_path / "back"), expected)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    hf = hf_folder(tmp_path / "hf", shards=2)
    files = sorted(hf.glob("*.safetensors"))
    first, second = (tensors_in_folder(hf), read_tensors(hf))
    name = next(name for name, tensor in first.items() if tensor.file == files[0])
    own = {n: second[n] for n, tensor in first.items() if tensor.file == files[1]}
    save_file(own | {name: torch.zeros(3)}, files[1])
    refused(hf, f"has tensor {name} twice, in {files[0].name} and in {files[1].name}")


def test_shards_without_an_index_are_refused(tmp_path):
    hf = hf_folder(tmp_path / "hf", shards=2)
    (hf / "model.safetensors.index.json").unlink()
    refused(hf, "has model-00001-of-00002.safetensors, but no model.safetensors.index.json")


@pytest.mark.parametrize("change", ["value", "shape", "precision"])
def test_a_tied_model_with_another_head_is_refused(tmp_path, change):
    hf = hf_folder(tmp_path / "hf", CONFIG | {"tie_word_embeddings": True})
    head = read_tensors(hf)[EMBEDDING].clone()
    if change == "value":
        head.view(torch.int16)[-1, -1] ^= 1
    head = {"value": head, "shape": head[:-1].clone(), "precision": head.float()}[change]
    rewritten(hf, read_tensors(hf) | {HEAD: head})
    refused(hf, f"config.json ties the embeddings, but {HEAD} is not {EMBEDDING}")
    with pytest.raises(UserError, match="ties the embeddings"):
        compare(hf, hf)


EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 24}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_fp32_norms_among_bf16_weights_come_back_bit_for_bit(tmp_path, architecture, caplog):
    experts = EXPERTS if architecture in ("MixtralForCausalLM", "Qwen3MoeForCausalLM") else {}
    act = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 8}
    hf = hf_folder(tmp_path / "hf", CONFIG | {"architectures": [architecture], **experts, **act})
    tensors = {
        name: torch.randn(tensor.shape) if tensor.ndim == 1 and "norm" in name else tensor
        for name, tensor in read_tensors(hf).items()
    }
    rewritten(hf, tensors)
    with caplog.at_level(logging.INFO):
        identity = import_checkpoint(hf, tmp_path / "checkpoint")
    assert identity.dtype == "bfloat16" and set(identity.other_dtypes.values()) == {"float32"}
    assert "is bfloat16, except for decoder" in caplog.text
    stored = TorchDistReader(tmp_path / "checkpoint" / "weights").tensors
    for key, dtype in identity.other_dtypes.items():
        assert "norm" in key and str(stored["module." + key].properties.dtype) == f"torch.{dtype}"

    assert read_metadata(tmp_path / "checkpoint") == identity
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    assert_equal(read_tensors(tmp_path / "back"), tensors)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for a, b in ((hf, tmp_path / "checkpoint"), (tmp_path / "back", hf), (tmp_path / "checkpoint",) * 2):
        assert compare(a, b).different == compare(b, a).different == []
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "one", dtype="bfloat16")
    assert_equal(read_tensors(tmp_path / "one"), {name: tensor.bfloat16() for name, tensor in tensors.items()})
    assert len(compare(tmp_path / "one", hf).different) == sum(t.dtype == torch.float32 for t in tensors.values())


def test_buffers_are_left_out_in_every_family(tmp_path):
    for number, architecture in enumerate(FAMILIES):
        experts = EXPERTS if architecture in ("MixtralForCausalLM", "Qwen3MoeForCausalLM") else {}
        act = {"hidden_activation": "gelu_pytorch_tanh", "head_dim": 8}
        hf = hf_folder(tmp_path / f"hf{number}", CONFIG | {"architectures": [architecture], **experts, **act})
        tensors = read_tensors(hf)
        buffers = {
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "model.rotary_emb.inv_freq": torch.ones(4),
            "model.layers.0.self_attn.rotary_emb.cos_cached": torch.ones(4),
            "model.layers.1.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
            "model.layers.1.attn.masked_bias": torch.ones(1),
        }
        rewritten(hf, tensors | buffers)
        import_checkpoint(hf, tmp_path / f"checkpoint{number}")
        export_checkpoint(tmp_path / f"checkpoint{number}", hf, tmp_path / f"back{number}")
        assert_equal(read_tensors(tmp_path / f"back{number}"), tensors)
        assert compare(hf, tmp_path / f"back{number}").different == []


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model.", "_orig_mod.module."])
def test_names_of_a_wrapped_model_are_refused_by_the_wrapper(tmp_path, prefix):
    hf = hf_folder(tmp_path / "hf")
    rewritten(hf, {prefix + name: tensor for name, tensor in read_tensors(hf).items()})
    refused(hf, f"has tensor {prefix}.*saved inside a wrapper")


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_its_head_is_read(tmp_path, tied):
    hf = hf_folder(tmp_path / "hf", CONFIG | {"tie_word_embeddings": tied})
    tensors = read_tensors(hf)
    rewritten(hf, {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    import_checkpoint(hf, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    assert_equal(read_tensors(tmp_path / "back"), tensors)
    assert compare(hf, tmp_path / "back").different == compare(tmp_path / "checkpoint", hf).different == []


def test_fp8_weights_without_a_quantization_config_are_named(tmp_path):
    hf = hf_folder(tmp_path / "hf")
    name = "model.layers.0.mlp.up_proj.weight"
    scale = {name + "_scale_inv": torch.ones(1)}
    rewritten(hf, read_tensors(hf) | {name: read_tensors(hf)[name].to(torch.float8_e4m3fn)} | scale)
    refused(hf, f"has F8_E4M3 weights \\({name}\\).*before it was quantized")


def test_a_missing_head_names_the_key_that_may_be_wrong(tmp_path):
    hf = hf_folder(tmp_path / "hf", CONFIG | {"tie_word_embeddings": True})
    (hf / "config.json").write_text(json.dumps(CONFIG))
    refused(hf, f"lacks tensor {HEAD}.*; if the embeddings are tied, set tie_word_embeddings to true")


def test_an_adapter_has_no_weights_to_compare(tmp_path):
    hf = hf_folder(tmp_path / "hf")
    (hf / "model.safetensors").rename(hf / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds an adapter"):
        compare(hf, hf)


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": ["BF16"]},
        {"dtype": None},
        {"shape": ["32"]},
        {"shape": [-32]},
        {"shape": 32},
        {"shape": None},
        {"data_offsets": []},
        {"data_offsets": [64, 0]},
        {"data_offsets": [0, "64"]},
        {"data_offsets": [0, None]},
        {"data_offsets": [0, 10**30]},
    ],
)
def test_a_header_that_makes_no_sense_is_refused(tmp_path, change):
    hf = hf_folder(tmp_path / "hf")
    path = hf / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"] |= change
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(hf, "model.safetensors is (not a safetensors file|truncated|corrupt)")
