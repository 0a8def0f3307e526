"""verify: equal and different models, as folders and as checkpoints, and the exit code."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.hf_folder import CONFIG, hf_folder, read_tensors
from treg_megatron.checkpoint.compare import compare
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.to_hf import export_checkpoint
from treg_megatron.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
CHANGED = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def checkpoint(hf) -> Path:
    import_checkpoint(hf, hf.parent / "checkpoint")
    return hf.parent / "checkpoint"


@pytest.fixture(scope="module")
def changed(hf) -> tuple[Path, Path]:
    """A copy of the folder with one bit changed, and the checkpoint imported from it."""
    folder = hf.parent / "changed"
    shutil.copytree(hf, folder)
    tensors = read_tensors(folder)
    tensors[CHANGED].view(torch.int16)[5, 7] ^= 1
    save_file(tensors, folder / "model.safetensors")
    import_checkpoint(folder, hf.parent / "changed_checkpoint")
    return folder, hf.parent / "changed_checkpoint"


def test_the_same_model_in_every_form_is_the_same(hf, checkpoint, tmp_path):
    sharded = hf_folder(tmp_path / "sharded", shards=3)
    for a in (hf, sharded, checkpoint):
        for b in (hf, sharded, checkpoint):
            found = compare(a, b)
            assert (found.tensors, found.different) == (30, [])
    assert found.nbytes == sum(tensor.nbytes for tensor in read_tensors(hf).values())


def test_a_second_copy_of_tied_weights_is_no_difference(tmp_path):
    hf = hf_folder(tmp_path / "hf", CONFIG | {"tie_word_embeddings": True})
    import_checkpoint(hf, tmp_path / "checkpoint")
    twice = tmp_path / "twice"
    shutil.copytree(hf, twice)
    tensors = read_tensors(hf)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, twice / "model.safetensors")
    for a in (hf, tmp_path / "checkpoint"):
        assert compare(a, twice).different == compare(twice, a).different == []


def test_one_bit_is_found_in_every_form(hf, checkpoint, changed):
    for a in (hf, checkpoint):
        for b in changed:
            assert compare(a, b).different == compare(b, a).different == [CHANGED]


def test_a_tensor_that_one_model_lacks_is_named(hf, checkpoint, tmp_path):
    tensors = read_tensors(hf)
    del tensors[CHANGED]
    (tmp_path / "less").mkdir()
    save_file(tensors, tmp_path / "less" / "model.safetensors")
    for complete in (hf, checkpoint):
        assert compare(complete, tmp_path / "less").different == [CHANGED]


def test_another_shape_is_different(checkpoint, tmp_path):
    found = compare(checkpoint, hf_folder(tmp_path / "hf", CONFIG | {"intermediate_size": 64}))
    assert found.different[0] == "model.layers.0.mlp.gate_proj.weight" and len(found.different) == 9


def test_precisions_of_folders_differ_but_a_checkpoint_compares_as_it_would_be_exported(hf, checkpoint, tmp_path):
    export_checkpoint(checkpoint, hf, tmp_path / "fp32", dtype="float32")
    assert len(compare(hf, tmp_path / "fp32").different) == 30
    assert compare(checkpoint, tmp_path / "fp32").different == []


def test_what_is_not_a_model_is_refused(hf, checkpoint, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished" / "weights").mkdir(parents=True)
    for other, said in (
        (tmp_path / "none", "does not exist"),
        (tmp_path / "empty", "no model.safetensors"),
        (tmp_path / "unfinished", "not a complete checkpoint"),
    ):
        for known in (hf, checkpoint):
            with pytest.raises(UserError, match=said):
                compare(known, other)


@pytest.mark.parametrize("same, code, verdict", [(True, 0, "the same"), (False, 1, "DIFFERENT")])
def test_command_line_says_a_verdict_and_exits_with_it(hf, changed, same, code, verdict, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", "verify", str(hf), str(hf if same else changed[0])])
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert exit.value.code == code
    assert capsys.readouterr().out.splitlines()[-1] == f"verdict: {verdict}"


def test_shard_size_is_a_flag_of_export(hf, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "convert_checkpoint.py",
            "export",
            "--checkpoint",
            str(checkpoint),
            "--base",
            str(hf),
            "--output",
            str(tmp_path / "back"),
            "--shard-size",
            "2e-5",
        ],
    )
    runpy.run_path(str(TOOL), run_name="__main__")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all((tmp_path / "back" / name).stat().st_size < 20_000 + 5_000 for name in files)
    assert compare(hf, tmp_path / "back").different == []
