"""What an export carries besides the weights, and in which precision."""

import dataclasses
import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from tests.support.hf_folder import CONFIG, hf_folder, read_tensors
from treg_megatron.checkpoint.buffers import copy_within_range
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.layout import read_metadata, write_metadata
from treg_megatron.checkpoint.to_hf import export_checkpoint
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import load_tokenizer

EMBEDDING = "model.embed_tokens.weight"


def test_export_carries_what_the_model_needs(tmp_path, caplog):
    hf = hf_folder(tmp_path / "hf", CONFIG | {"auto_map": {"AutoConfig": "configuration_own.OwnConfig"}})
    extras = ("configuration_own.py", "helpers.py", "tekken.json", "preprocessor_config.json", "processor_config.json")
    extras += ("added_tokens.json", "vocab.json", "merges.txt", "qwen.tiktoken", "chat_template.json")
    for name in extras:
        (hf / name).write_text("{}" if name.endswith(".json") else "raise SystemExit('executed')")
    (hf / "training_args.bin").touch()
    import_checkpoint(hf, tmp_path / "checkpoint")
    with caplog.at_level(logging.INFO):
        export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    assert "copied configuration_own.py, helpers.py" in caplog.text
    for name in extras:
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes(), name
    assert not (tmp_path / "back" / "training_args.bin").exists()


def test_the_chat_template_that_a_run_trained_with_becomes_the_default(chatml, tmp_path):
    hf = hf_folder(tmp_path / "hf", CONFIG | {"vocab_size": chatml.vocab_size})
    chatml._tokenizer.save_pretrained(hf)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "owl.jinja").write_text("Owl: " + chatml.template)
    import_checkpoint(hf, tmp_path / "checkpoint")
    identity = read_metadata(tmp_path / "checkpoint")
    for name, expected in (("owl", "Owl: " + chatml.template), (None, chatml.template)):
        run = {"data": {"tokenizer": {"chat_template": name} if name else {}}}
        write_metadata(tmp_path / "checkpoint", dataclasses.replace(identity, run=run))
        export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / f"back {name}")
        assert load_tokenizer(tmp_path / f"back {name}").template == expected
        assert load_tokenizer(tmp_path / f"back {name}", "owl").template == "Owl: " + chatml.template


def test_code_that_no_auto_map_names_stays(tmp_path):
    hf = hf_folder(tmp_path / "hf")
    (hf / "train.py").touch()
    import_checkpoint(hf, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    assert not (tmp_path / "back" / "train.py").exists()


@pytest.mark.parametrize("keys", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
def test_config_json_names_one_precision(tmp_path, keys):
    config = {k: v for k, v in CONFIG.items() if k != "torch_dtype"} | dict.fromkeys(keys, "float16")
    hf = hf_folder(tmp_path / "hf", config)
    import_checkpoint(hf, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    found = {k: written[k] for k in ("dtype", "torch_dtype") if k in written}
    assert found == dict.fromkeys(keys or ["torch_dtype"], "bfloat16")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.k_proj.weight", "model.layers.2.mlp.up_proj.weight"])
def test_a_value_beyond_the_range_of_the_precision_is_refused(tmp_path, name):
    hf = hf_folder(tmp_path / "hf")
    tensors = read_tensors(hf)
    tensors[EMBEDDING][0, 0], tensors[EMBEDDING][0, 1] = torch.inf, torch.nan  # what no precision changes
    tensors[name][3, 5] = -1e30
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    import_checkpoint(hf, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "same")
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "wider", dtype="float32")
    with pytest.raises(UserError, match=f"{name} has values beyond the range of float16, 65504"):
        export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "narrower", dtype="float16")
    assert not (tmp_path / "narrower").exists()


def test_the_largest_values_of_fp32_do_not_fit_into_bf16():
    copy_within_range(torch.empty(1, dtype=torch.bfloat16), torch.tensor([3.389e38]), "x")
    with pytest.raises(UserError, match="x has values beyond the range of bfloat16"):
        copy_within_range(torch.empty(1, dtype=torch.bfloat16), torch.tensor([3.4e38]), "x")
