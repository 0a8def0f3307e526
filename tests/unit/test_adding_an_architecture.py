"""The documented steps for adding an architecture, followed literally."""

import re
from pathlib import Path

import torch

from tests.unit.test_conversion import CONFIG, assert_equal, hf_folder, read_tensors
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.to_hf import export_checkpoint
from treg_megatron.models.families import FAMILIES, model_fields

PAGE = Path(__file__).resolve().parents[2] / "docs" / "CONVERSION.md"


def test_the_file_on_the_page_imports_and_exports(tmp_path, monkeypatch):
    for name, family in list(FAMILIES.items()):
        monkeypatch.setitem(FAMILIES, name, family)  # undo the file's registration after the test
    section = PAGE.read_text(encoding="utf-8").split("## Adding an architecture")[1]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert "SeedOssForCausalLM" not in FAMILIES
    exec(compile(code, "seed_oss.py", "exec"), {"__name__": "seed_oss"})
    monkeypatch.setitem(FAMILIES, "AnotherForCausalLM", FAMILIES.pop("SeedOssForCausalLM"))
    config = CONFIG | {"architectures": ["AnotherForCausalLM"], "attention_bias": True, "head_dim": 16}
    assert model_fields(config)["add_qkv_bias"] and model_fields(config)["kv_channels"] == 16

    hf = hf_folder(tmp_path / "hf", config)
    tensors = read_tensors(hf)
    assert tensors["model.layers.2.self_attn.q_proj.bias"].shape == (4 * 16,)
    import_checkpoint(hf, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    assert_equal(read_tensors(tmp_path / "back"), tensors)
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
