"""What transformers renamed between 4.53, which NeMo 2.6 asks for, and 4.57."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from treg_megatron.models.huggingface import dtype_option, set_attention


@pytest.mark.parametrize(
    "version, name", [("4.53.3", "torch_dtype"), ("4.56.0", "dtype"), ("4.57.0.dev0", "dtype"), ("5.0.1", "dtype")]
)
def test_the_option_for_a_models_precision(version, name, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", version)
    assert dtype_option(torch.bfloat16) == {name: torch.bfloat16}


def test_attention_is_chosen_by_the_models_method_or_else_in_its_config():
    chosen = []
    set_attention(SimpleNamespace(set_attn_implementation=chosen.append), "sdpa")
    assert chosen == ["sdpa"]
    old = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"))
    set_attention(old, "sdpa")
    assert old.config._attn_implementation == "sdpa"
