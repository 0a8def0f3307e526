"""Conversion without Megatron: exact round trips, folders for transformers, and refusals without leftovers."""

import dataclasses
import errno
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.checkpoints import certify
from tests.support.hf_folder import CONFIG, hf_folder, read_tensors
from treg_megatron.checkpoint import layout
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.to_hf import export_checkpoint
from treg_megatron.checkpoint.torch_dist import TorchDistReader
from treg_megatron.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return hf_folder(tmp_path_factory.mktemp("model") / "hf")


@pytest.fixture(scope="module")
def checkpoint(hf) -> Path:
    import_checkpoint(hf, hf.parent / "checkpoint")
    return hf.parent / "checkpoint"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_import_then_export_is_the_original_bit_for_bit(tmp_path, dtype, tied, shards):
    hf = hf_folder(tmp_path / "hf", CONFIG | {"tie_word_embeddings": tied}, dtype, shards)
    import_checkpoint(hf, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    assert_equal(read_tensors(tmp_path / "back"), read_tensors(hf))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "checkpoint", "hf"]


def test_exported_folder_has_what_transformers_needs(hf, checkpoint, tmp_path):
    export_checkpoint(checkpoint, hf, tmp_path / "back")
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()
    assert (tmp_path / "back" / "chat_template.jinja").is_file()
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == CONFIG
    assert "base_model: hf" in (tmp_path / "back" / "README.md").read_text()


def test_large_models_are_written_in_shards_with_an_index(hf, checkpoint, tmp_path):
    exported = export_checkpoint(checkpoint, hf, tmp_path / "back", shard_bytes=10_000)
    files = sorted(p.name for p in (tmp_path / "back").glob("*.safetensors"))
    assert len(files) == exported.files > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "back" / file, "pt") as shard:
            assert name in shard.keys()
    assert index["metadata"]["total_size"] == exported.nbytes
    assert_equal(read_tensors(tmp_path / "back"), read_tensors(hf))


def test_export_in_another_precision(hf, checkpoint, tmp_path):
    export_checkpoint(checkpoint, hf, tmp_path / "back", dtype="float32")
    assert_equal(read_tensors(tmp_path / "back"), {k: v.float() for k, v in read_tensors(hf).items()})
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_second_copy_of_tied_weights_is_left_out(tmp_path):
    hf = hf_folder(tmp_path / "hf", CONFIG | {"tie_word_embeddings": True})
    tensors = read_tensors(hf)
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        hf / "model.safetensors",
        metadata={"format": "pt"},
    )
    import_checkpoint(hf, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    assert_equal(read_tensors(tmp_path / "back"), tensors)


def test_rotary_buffers_of_old_folders_are_left_out(tmp_path):
    hf = hf_folder(tmp_path / "hf")
    tensors = read_tensors(hf)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, hf / "model.safetensors")
    import_checkpoint(hf, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    assert_equal(read_tensors(tmp_path / "back"), tensors)


def test_the_model_card_tells_the_run(hf, checkpoint, tmp_path):
    objective = {"loss_type": "dpo", "alpha": 0.25, "token_rewards": "contrastive"}
    run = {
        "recipe": {"name": "mine", "objective": objective},
        "data": {"pairs": 64},
        "step": 20,
        "metrics": {"rewards/margins": 0.5},
    }
    export_checkpoint(checkpoint, hf, tmp_path / "back", run=run)
    header, card = (tmp_path / "back" / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(header)["base_model"] == "hf"
    assert card.startswith("\n# hf, after DPO with [T-REG](")
    sections = dict(re.findall(r"^## (.+?)\n\n```yaml\n(.*?)```", card, re.MULTILINE | re.DOTALL))
    assert {title: yaml.safe_load(content) for title, content in sections.items()} == {
        "Objective": objective,
        "Metrics of step 20": run["metrics"],
        "Training data": run["data"],
        "Recipe": run["recipe"],
    }
    objective["alpha"] = 0
    export_checkpoint(checkpoint, hf, tmp_path / "plain", run=run)
    assert "# hf, after DPO\n" in (tmp_path / "plain" / "README.md").read_text()


def test_newest_complete_checkpoint_of_a_run_is_exported(hf, checkpoint, tmp_path):
    steps = tmp_path / "run" / "checkpoints"
    for step in (9, 10, 11, 12):
        shutil.copytree(checkpoint, steps / f"step_{step:06d}")
    (steps / "step_000012-unfinished").touch()
    (steps / "step_000011" / "treg.json").unlink()
    assert layout.newest_checkpoint(tmp_path / "run") == steps / "step_000010"
    exported = export_checkpoint(tmp_path / "run", hf, tmp_path / "back")
    assert exported.checkpoint == steps / "step_000010"


def test_a_run_without_checkpoints_has_no_newest(tmp_path):
    assert layout.newest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoints").mkdir()
    assert layout.newest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="no complete checkpoint yet"):
        layout.find_checkpoint(tmp_path)


def truncated(hf: Path) -> None:
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_header(hf: Path) -> None:
    path = hf / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def without_tensor(hf: Path) -> None:
    tensors = read_tensors(hf)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, hf / "model.safetensors")


def with_extra_tensor(hf: Path) -> None:
    save_file(read_tensors(hf) | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}, hf / "model.safetensors")


def with_two_precisions(hf: Path) -> None:
    name = "model.layers.1.input_layernorm.weight"
    save_file(read_tensors(hf) | {name: torch.zeros(32)}, hf / "model.safetensors")


def with_integers(hf: Path) -> None:
    save_file({k: v.to(torch.int8) for k, v in read_tensors(hf).items()}, hf / "model.safetensors")


def pickled_only(hf: Path) -> None:
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")


def other_config(change: dict):
    def write(hf: Path) -> None:
        (hf / "config.json").write_text(json.dumps(CONFIG | change))

    return write


@pytest.mark.parametrize(
    "damage, said",
    [
        (truncated, "is truncated: .* bytes of"),
        (cut_in_header, "truncated or not a safetensors file"),
        (without_tensor, "lacks tensor model.layers.1.mlp.up_proj.weight"),
        (with_extra_tensor, "has tensor model.layers.0.self_attn.q_proj.bias, which is not part of a Llama"),
        (with_two_precisions, "mixes bfloat16 and float32, the latter in model.layers.1.input_layernorm.weight"),
        (with_integers, "has I8 weights"),
        (pickled_only, "only pickled weights \\(pytorch_model.bin\\)"),
        (other_config({"intermediate_size": 64}), "has shape \\[48, 32\\], config.json says \\[64, 32\\]"),
        (other_config({"num_hidden_layers": 4}), "lacks tensor model.layers.3."),
        (other_config({"num_hidden_layers": 2}), "has tensor model.layers.2."),
        (other_config({"architectures": ["MambaForCausalLM"]}), "known: .*LlamaForCausalLM"),
        (lambda hf: (hf / "config.json").write_text("{"), "not valid JSON"),
        (lambda hf: (hf / "config.json").unlink(), "config.json does not exist"),
        (lambda hf: (hf / "model.safetensors").unlink(), "no model.safetensors"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_import_of_a_bad_folder_is_refused_and_leaves_nothing(tmp_path, damage, said):
    hf = hf_folder(tmp_path / "hf")
    damage(hf)
    with pytest.raises(UserError, match=said):
        import_checkpoint(hf, tmp_path / "checkpoint")
    assert {p.name for p in tmp_path.iterdir()} <= {"hf"}


def test_a_missing_shard_is_named(tmp_path):
    hf = hf_folder(tmp_path / "hf", shards=3)
    (hf / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors does not exist"):
        import_checkpoint(hf, tmp_path / "checkpoint")


def test_a_truncated_shard_is_named(tmp_path):
    hf = hf_folder(tmp_path / "hf", shards=3)
    path = hf / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="model-00003-of-00003.safetensors is truncated"):
        import_checkpoint(hf, tmp_path / "checkpoint")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_an_index_that_places_a_tensor_elsewhere_is_refused(tmp_path):
    hf = hf_folder(tmp_path / "hf", shards=2)
    index = json.loads((hf / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = next(
        name for name in index["weight_map"].values() if name != index["weight_map"]["model.norm.weight"]
    )
    (hf / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks tensor model.norm.weight, which model.safetensors.index.json places"):
        import_checkpoint(hf, tmp_path / "checkpoint")


def test_too_little_disk_is_refused_before_anything_is_written(hf, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12 - 1000, 1000))
    for convert, output in (
        (import_checkpoint, tmp_path / "checkpoint"),
        (lambda hf, output: export_checkpoint(checkpoint, hf, output), tmp_path / "back"),
    ):
        with pytest.raises(UserError, match="not enough disk space for .*: it needs 0.0 GB, 0.0 GB are free"):
            convert(hf, output)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_midway_leaves_nothing(hf, tmp_path, monkeypatch):
    from treg_megatron.checkpoint.buffers import OutputFile

    def fill(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OutputFile, "write", fill)
    with pytest.raises(UserError, match="the disk of .* is full; nothing was written"):
        import_checkpoint(hf, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_family_is_refused(checkpoint, tmp_path):
    hf = hf_folder(tmp_path / "hf", CONFIG | {"architectures": ["MistralForCausalLM"]})
    with pytest.raises(UserError, match="architecture is 'LlamaForCausalLM' and 'MistralForCausalLM'"):
        export_checkpoint(checkpoint, hf, tmp_path / "back")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_an_existing_output_is_never_overwritten(hf, checkpoint, tmp_path):
    with pytest.raises(UserError, match="already exists"):
        import_checkpoint(hf, checkpoint)
    with pytest.raises(UserError, match="already exists"):
        export_checkpoint(checkpoint, hf, tmp_path)


def test_what_a_killed_conversion_left_is_written_anew(hf, tmp_path):
    (tmp_path / "checkpoint.unfinished" / "weights").mkdir(parents=True)
    import_checkpoint(hf, tmp_path / "checkpoint")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_conversion_that_fails_midway_leaves_nothing(hf, tmp_path, monkeypatch):
    from treg_megatron.checkpoint.torch_dist import TorchDistWriter

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchDistWriter, "write_object", fail)
    with pytest.raises(KeyboardInterrupt):
        import_checkpoint(hf, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def unfinished(checkpoint: Path) -> None:
    checkpoint.with_name(checkpoint.name + "-unfinished").touch()


def hostile_metadata(checkpoint: Path) -> None:
    (checkpoint / "weights" / ".metadata").write_bytes(b"cposix\nsystem\n(S'echo'\ntR.")
    certify(checkpoint)  # an attacker would update the list of files, too


def cut_data(checkpoint: Path) -> None:
    path = checkpoint / "weights" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:20_000])


@pytest.mark.parametrize(
    "damage, said",
    [
        (unfinished, "is unfinished"),
        (lambda c: (c / "treg.json").unlink(), "is not a complete checkpoint"),
        (lambda c: (c / "treg.json").write_text('{"schema": 99}'), "schema 99"),
        (lambda c: (c / "treg.json").write_text('{"schema": 1}'), "does not fit its schema"),
        (lambda c: shutil.rmtree(c / "weights"), r"weights/.metadata is missing"),
        (hostile_metadata, "posix.system"),
        (cut_data, "__0_0.distcp has 20000 bytes, [0-9]+ bytes were written"),
        (lambda c: (c / "weights" / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_export_of_a_bad_checkpoint_is_refused_and_leaves_nothing(hf, checkpoint, tmp_path, damage, said):
    shutil.copytree(checkpoint, tmp_path / "checkpoint")
    damage(tmp_path / "checkpoint")
    with pytest.raises(UserError, match=said):
        export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("back")]


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_size": 64}, "hidden_size is 32 and 64"),
        ({"rope_theta": 5e5}, "rotary_base"),
        ({"architectures": ["MambaForCausalLM"]}, "known: .*LlamaForCausalLM"),
    ],
)
def test_a_base_of_another_model_is_refused(checkpoint, tmp_path, change, said):
    hf = hf_folder(tmp_path / "hf", CONFIG | change) if "architectures" not in change else hf_folder(tmp_path / "hf")
    (hf / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(UserError, match=said):
        export_checkpoint(checkpoint, hf, tmp_path / "back")


@pytest.mark.parametrize(
    "tied, change, said",
    [
        (False, {"num_hidden_layers": 4}, r"linear_qkv.layer_norm_weight has shape \[3, 32\], .* says \[4, 32\]"),
        (False, {"num_hidden_layers": 2}, r"linear_qkv.layer_norm_weight has shape \[3, 32\], .* says \[2, 32\]"),
        (False, {"vocab_size": 102}, r"word_embeddings.weight has shape \[101, 32\], .* says \[102, 32\]"),
        (False, {"tie_word_embeddings": True}, "has module.output_layer.weight, which is not part"),
        (True, {"tie_word_embeddings": False}, "lacks module.output_layer.weight"),
    ],
)
def test_a_checkpoint_that_disagrees_with_its_config_is_refused(tmp_path, tied, change, said):
    hf = hf_folder(tmp_path / "hf", CONFIG | {"tie_word_embeddings": tied})
    identity = import_checkpoint(hf, tmp_path / "checkpoint")
    config = identity.hf_config | change
    (hf / "config.json").write_text(json.dumps(config))
    layout.write_metadata(tmp_path / "checkpoint", dataclasses.replace(identity, hf_config=config))
    with pytest.raises(UserError, match=said):
        export_checkpoint(tmp_path / "checkpoint", hf, tmp_path / "back")


def test_command_line_prints_one_line_and_exits_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys,
        "argv",
        ["convert_checkpoint.py", "import", "--hf", str(tmp_path / "none"), "--checkpoint", str(tmp_path / "out")],
    )
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: Hugging Face folder {tmp_path / 'none'} does not exist\n"


def test_command_line_goes_there_and_back(hf, tmp_path, monkeypatch, capsys):
    for argv in (
        ["import", "--hf", str(hf), "--checkpoint", str(tmp_path / "checkpoint")],
        ["export", "--checkpoint", str(tmp_path / "checkpoint"), "--base", str(hf), "--output", str(tmp_path / "back")],
    ):
        monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *argv])
        runpy.run_path(str(TOOL), run_name="__main__")
    assert_equal(read_tensors(tmp_path / "back"), read_tensors(hf))
    imported, exported = capsys.readouterr().out.splitlines()
    assert imported.startswith("imported LlamaForCausalLM (bfloat16)")
    assert exported.startswith("exported ")


def test_help_imports_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['x', 'export', '--help']\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_export_where_the_kernel_cannot_copy_between_the_file_systems(hf, checkpoint, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    export_checkpoint(checkpoint, hf, tmp_path / "back")
    assert_equal(read_tensors(tmp_path / "back"), read_tensors(hf))


@pytest.mark.parametrize("module, name", [("torch.distributed.checkpoint.filesystem", "os.getcwd"), ("os", "getcwd")])
def test_metadata_that_names_a_function_is_not_executed(module, name, tmp_path):
    """A pickle in protocol 4 may name an attribute of an attribute: ``os.system`` of a harmless module's ``os``."""
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    (tmp_path / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + text + b"\x93)R.")
    with pytest.raises(UserError, match=f"refers to {module}.{name}, which is not allowed"):
        TorchDistReader(tmp_path)
