"""What a path may name instead of a model's folder, tokenizers too large for their model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.hf_folder import hf_folder, read_tensors
from tests.support.tiny import tiny_llama, tiny_tokenizer
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.to_hf import export_checkpoint
from treg_megatron.errors import UserError
from treg_megatron.models.huggingface import load_causal_lm
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.tokenizer.model_folder import model_folder, tokens_in_folder


def test_what_is_no_model_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    cache = tmp_path / "hub" / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    hf_folder(snapshot)
    (tmp_path / "a.safetensors").touch()
    for path, said in (
        (adapter, "holds an adapter .* for the model org/base"),
        (cache, f"config.json does not exist; did you mean {snapshot}?"),
        (cache.parent, f"config.json does not exist; did you mean {snapshot}?"),
        (snapshot.parent, f"config.json does not exist; did you mean {snapshot}?"),
        ("org/name", "does not exist; to use that model of the hub, download it first: hf download org/name"),
        ("./org/name", "does not exist$"),
        ("a.safetensors", "is a file; name the Hugging Face folder"),
    ):
        for use in (model_folder, lambda path: import_checkpoint(path, tmp_path / "out")):
            with pytest.raises(UserError, match=said):
                use(path)
    with pytest.raises(UserError, match="tokenizer folder org/name does not exist; to use that model of the hub"):
        load_tokenizer("org/name")


def test_the_home_folder_is_understood(tmp_path, monkeypatch):
    from treg_megatron.config.recipe import find_recipe, load_recipe, section

    monkeypatch.setenv("HOME", str(tmp_path))
    hf_folder(tmp_path / "hf")
    assert model_folder("~/hf") == tmp_path / "hf"
    import_checkpoint("~/hf", tmp_path / "checkpoint")
    model = section(load_recipe(overrides=["model.hf=~/hf", "model.checkpoint=~/checkpoint"]), "model")
    assert (model.hf, model.checkpoint) == (str(tmp_path / "hf"), str(tmp_path / "checkpoint"))
    (tmp_path / "mine.yaml").touch()
    assert find_recipe("~/mine.yaml") == tmp_path / "mine.yaml"


@pytest.fixture
def crowded(tmp_path) -> Path:
    """A model of 384 embeddings whose tokenizer has one token more."""
    hf = tmp_path / "crowded"
    tiny_llama(hf, vocab=tiny_tokenizer(hf))
    content = json.loads((hf / "tokenizer.json").read_text())
    pad = content["added_tokens"][0] | {"id": 384, "content": "[PAD]"}
    content["added_tokens"].append(pad)
    (hf / "tokenizer.json").write_text(json.dumps(content))
    return hf


CROWDED = "tokenizer of .* has 385 tokens, but its model embeds only 384"


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused_by_every_step(crowded, tmp_path):
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.labelling.indexing import index

    with pytest.raises(UserError, match=CROWDED):
        import_checkpoint(crowded, tmp_path / "out")
    with pytest.raises(UserError, match=CROWDED):
        load_tokenizer(crowded)
    labelled = tmp_path / "pairs.jsonl"
    labelled.write_text("{}\n", encoding="utf-8")
    settings = [f"index.tokenizer={crowded}", f"index.labelled={labelled}", f"index.output={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=CROWDED):
        index(section(load_recipe(overrides=settings), "index"))
    fitting = tmp_path / "fitting"
    shutil.copytree(crowded, fitting)
    for path in fitting.glob("tokenizer*"):
        path.unlink()
    import_checkpoint(fitting, tmp_path / "checkpoint")
    with pytest.raises(UserError, match=CROWDED):
        export_checkpoint(tmp_path / "checkpoint", crowded, tmp_path / "out")


@pytest.mark.parametrize(
    "name, content, tokens",
    [
        ("tokenizer.json", {"model": {"vocab": {"a": 0, "b": 6}}, "added_tokens": [{"id": 4}]}, 7),
        ("tokenizer.json", {"model": {"vocab": [["a", 0.0], ["b", -1.0]]}}, 2),
        ("tokenizer.json", {"kept": "as it is"}, 0),
        ("tokenizer_config.json", {"model_max_length": 4096, "added_tokens_decoder": {"9": {}, "2": {}}}, 10),
        ("added_tokens.json", {"[PAD]": 32000}, 32001),
        ("vocab.json", {"a": 0, "b": 1}, 2),
        ("tokenizer.json", {"model": {"vocab": 5}, "added_tokens": 7}, 0),
        ("tokenizer.json", {"model": [], "added_tokens": [3, {"id": "x"}]}, 0),
        ("tokenizer_config.json", {"added_tokens_decoder": [{}]}, 0),
    ],
)
def test_the_ids_of_a_tokenizer_are_counted_without_loading_it(tmp_path, name, content, tokens):
    (tmp_path / name).write_text(json.dumps(content))
    assert tokens_in_folder(tmp_path) == tokens


@pytest.mark.parametrize("nested", [False, True])
def test_transformers_computes_with_the_rotary_settings_of_transformers_5(tmp_path, nested):
    tiny_llama(tmp_path)
    path = tmp_path / "config.json"
    older = json.loads(path.read_text()) | {"rope_theta": 500.0}
    older["rope_scaling"] = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    rope = {"rope_theta": older.pop("rope_theta"), **older.pop("rope_scaling")}
    tokens = torch.arange(50)[None]
    logits = []
    for spelling in (
        {"rope_theta": 500.0, "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}},
        {"rope_parameters": {"full_attention": rope} if nested else rope},
        {},
    ):
        path.write_text(json.dumps(older | spelling))
        with torch.no_grad():
            logits.append(load_causal_lm(tmp_path, torch.float32)(tokens).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2], atol=1e-3)


def test_weights_that_transformers_would_make_up_are_refused(tmp_path):
    tiny_llama(tmp_path)
    tensors = read_tensors(tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks tensor model.layers.1.mlp.up_proj.weight"):
        load_causal_lm(tmp_path, torch.float32)
