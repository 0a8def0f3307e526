"""The model under evaluation: a Hugging Face folder, or what a run exported."""

import pytest
from omegaconf import OmegaConf

from tests.support.checkpoints import small_checkpoint
from tests.support.hf_folder import hf_folder
from treg_megatron.checkpoint.layout import CheckpointMetadata, certify_export
from treg_megatron.config.recipe import load_recipe
from treg_megatron.errors import UserError
from treg_megatron.evaluation.arm import hugging_face_folder, model_name, require_name


def trained(run, *overrides):
    """A run's folder with one checkpoint, which holds the run's recipe."""
    recipe = load_recipe(overrides=["name=x", f"run={run}", *overrides])
    saved = {"recipe": OmegaConf.to_container(recipe, resolve=False)}
    metadata = CheckpointMetadata("LlamaForCausalLM", {}, "float32", "source", "test", run=saved)
    small_checkpoint(run / "train" / "checkpoints" / "step_000010", metadata)
    return run


def test_a_folder_is_itself(tmp_path):
    folder = hf_folder(tmp_path / "model")
    assert hugging_face_folder(folder) == folder and model_name(folder) == "model"


def test_a_run_is_what_it_exported(tmp_path):
    run = trained(tmp_path / "run")
    hf_folder(run / "hf")
    for named in (run, run / "train", run / "hf"):
        assert hugging_face_folder(named) == run / "hf"
    assert model_name(run / "hf") == "run"


def test_a_run_may_export_elsewhere(tmp_path):
    run = trained(tmp_path / "run", f"export.output={tmp_path}/elsewhere")
    hf_folder(tmp_path / "elsewhere")
    for named in (run, run / "train", run / "train" / "checkpoints" / "step_000010"):
        assert hugging_face_folder(named) == tmp_path / "elsewhere"


def test_a_run_that_is_not_exported_is_refused(tmp_path):
    run = trained(tmp_path / "run")
    for named in (run, run / "train"):
        with pytest.raises(
            UserError, match=f"run .* is not exported yet .{run}/hf does not exist.: treg export --recipe {run}/train$"
        ):
            hugging_face_folder(named)


def test_a_damaged_export_is_refused(tmp_path):
    folder = hf_folder(tmp_path / "hf")
    certify_export(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="is not what was exported"):
        hugging_face_folder(folder)


@pytest.mark.parametrize(
    "name, message",
    [("runs/base/hf", "does not exist; export the run first"), ("meta-llama/Llama", "hf download meta-llama/Llama")],
)
def test_what_does_not_exist(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        hugging_face_folder(name)


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "a\nb"])
def test_names_that_no_file_has(name):
    assert require_name("Llama-3 8B (ours)", "evaluate.name") == "Llama-3 8B (ours)"
    with pytest.raises(UserError, match="set evaluate.name"):
        require_name(name, "evaluate.name")
