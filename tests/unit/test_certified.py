"""Certified means whole: over every moment of a save, an import and an export, and with two writers."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import certify, small_checkpoint
from tests.support.file_operations import States, before_each_operation, contents
from tests.support.hf_folder import hf_folder
from treg_megatron.checkpoint import layout
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.layout import (
    EXPORT_MANIFEST,
    CheckpointMetadata,
    damage,
    find_checkpoint,
    is_complete,
    newest_checkpoint,
    require_whole,
    require_whole_export,
)
from treg_megatron.checkpoint.run_folder import begin, checkpoint_to_resume, complete
from treg_megatron.checkpoint.to_hf import export_checkpoint
from treg_megatron.checkpoint.torch_dist import TorchDistWriter
from treg_megatron.errors import UserError
from treg_megatron.utils.lock import Lock


def save(run: Path, step: int, lock: Lock, keep: int = 1) -> Path:
    """What training does at a save, with weights that tell the step."""
    checkpoint = run / "checkpoints" / f"step_{step:06d}"
    begin(checkpoint, lock)
    (checkpoint / "weights").mkdir(parents=True)
    with TorchDistWriter(checkpoint / "weights") as writer:
        for name in ("a", "b"):
            writer.write_chunk(f"module.{name}", torch.full((40,), float(step)), (0,), (40,))
    metadata = CheckpointMetadata("LlamaForCausalLM", {}, "float32", "source", "test", run={"step": step})
    complete(checkpoint, metadata, keep, lock)
    return checkpoint


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a checkpoint of step 5."""
    with Lock(tmp_path / "run" / "checkpoints") as lock:
        save(tmp_path / "run", 5, lock)
    return tmp_path / "run"


def end_the_holders_of_locks(state: Path) -> None:
    """Make the lock files below a folder those of a process that has ended."""
    for path in state.rglob(".*.lock*"):
        if text := path.read_text():
            path.write_text(json.dumps(json.loads(text) | {"started": 1}))


def states_of_a_save(run: Path, copies: Path) -> tuple[list[Path], dict[str, dict[str, bytes]]]:
    states = States(run, copies)
    whole = {"step_000005": contents(run / "checkpoints" / "step_000005")}
    with Lock(run / "checkpoints") as lock:
        with before_each_operation(run, states.keep):
            save(run, 10, lock)
        states.keep()
    whole["step_000010"] = contents(run / "checkpoints" / "step_000010")
    return states.folders, whole


def test_at_every_moment_of_a_save_the_old_or_the_new_checkpoint_counts(run, tmp_path):
    folders, whole = states_of_a_save(run, tmp_path / "states")
    assert len(folders) > 12
    counted = []
    for state in folders:
        newest = newest_checkpoint(state)
        assert contents(newest) == whole[newest.name], state
        assert is_complete(newest) and damage(newest) is None
        assert checkpoint_to_resume(state) == newest
        assert {p.name for p in (state / "checkpoints").iterdir()} - {".checkpoints.lock"} <= whole.keys(), state
        counted.append(newest.name)
    assert counted == sorted(counted) and set(counted) == whole.keys()


def test_after_every_moment_of_a_save_the_next_job_goes_on(run, tmp_path):
    """Its lock is that of a process which has ended."""
    folders, _ = states_of_a_save(run, tmp_path / "states")
    for state in folders:
        end_the_holders_of_locks(state)
        with Lock(state / "checkpoints") as lock:
            resumed = checkpoint_to_resume(state)
            assert resumed.name in ("step_000005", "step_000010")
            newest = save(state, 15, lock)
        assert newest_checkpoint(state) == newest and [p.name for p in (state / "checkpoints").iterdir()] == [
            newest.name
        ]


def test_a_second_job_at_any_moment_of_a_save_is_refused_and_changes_nothing(run):
    refused = []

    def second_job() -> None:
        before = contents(run)
        with pytest.raises(UserError, match="checkpoints is being written by process"):
            Lock(run / "checkpoints").acquire()
        assert contents(run) == before
        refused.append(True)

    with Lock(run / "checkpoints") as lock, before_each_operation(run, second_job):
        save(run, 10, lock)
    assert len(refused) > 12 and newest_checkpoint(run).name == "step_000010"


def test_a_job_whose_lock_was_taken_over_neither_deletes_nor_certifies(run):
    with Lock(run / "checkpoints") as lock:
        checkpoint = run / "checkpoints" / "step_000010"
        begin(checkpoint, lock)
        (checkpoint / "weights").mkdir(parents=True)
        os.unlink(lock.path)
        with Lock(run / "checkpoints") as second:
            for action in (
                lambda: begin(checkpoint, lock),
                lambda: complete(checkpoint, CheckpointMetadata("", {}, "", "", ""), 1, lock),
            ):
                with pytest.raises(UserError, match="checkpoints now belongs to process"):
                    action()
            assert newest_checkpoint(run).name == "step_000005"
            assert save(run, 10, second) == newest_checkpoint(run)


def test_at_every_moment_of_an_import_it_is_absent_or_whole(tmp_path):
    hf, work = hf_folder(tmp_path / "hf"), tmp_path / "work"
    work.mkdir()
    states = States(work, tmp_path / "states")
    with before_each_operation(work, states.keep):
        import_checkpoint(hf, work / "megatron")
    whole = contents(work / "megatron")
    require_whole(work / "megatron")
    for state in states.folders:
        if (state / "megatron").exists():
            assert contents(state / "megatron") == whole
        else:
            end_the_holders_of_locks(state)
            import_checkpoint(hf, state / "megatron")
            assert contents(state / "megatron") == whole and [p.name for p in state.iterdir()] == ["megatron"]


def test_at_every_moment_of_an_export_it_is_absent_or_whole(tmp_path):
    hf, work = hf_folder(tmp_path / "hf"), tmp_path / "work"
    import_checkpoint(hf, tmp_path / "megatron")
    work.mkdir()
    states = States(work, tmp_path / "states")
    with before_each_operation(work, states.keep):
        export_checkpoint(tmp_path / "megatron", hf, work / "back")
    whole = contents(work / "back")
    require_whole_export(work / "back")
    assert any((state / "back.unfinished").exists() for state in states.folders)
    for state in states.folders:
        assert not (state / "back").exists() or contents(state / "back") == whole


@pytest.mark.parametrize(
    "harm, wrong",
    [
        (lambda c: None, None),
        (lambda c: (c / "weights" / "__0_0.distcp").unlink(), "weights/__0_0.distcp is missing"),
        (lambda c: (c / "weights" / "__0_0.distcp").write_bytes(b"weight"), "has 6 bytes, 7 bytes were written"),
        (lambda c: (c / "weights" / "__0_0.distcp").write_bytes(b"wEights"), "is not what was written"),
        (lambda c: shutil.rmtree(c / "weights"), "is missing"),
        (lambda c: (shutil.rmtree(c / "weights"), certify(c)), "its treg.json lists no weights"),
    ],
)
def test_what_counts_as_damage(harm, wrong, tmp_path):
    checkpoint = small_checkpoint(tmp_path / "checkpoints" / "step_000001")
    harm(checkpoint)
    if wrong is None:
        assert damage(checkpoint) is None and find_checkpoint(tmp_path) == checkpoint
        return
    assert wrong in damage(checkpoint)
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match=wrong):
        find_checkpoint(checkpoint)
    if "not what" not in wrong:  # sizes alone do not tell
        assert not is_complete(checkpoint)


def test_an_empty_checkpoint_that_is_certified_is_passed_over(run, caplog):
    empty = run / "checkpoints" / "step_000100"
    empty.mkdir()
    metadata = {"family": "x", "hf_config": {}, "dtype": "float32", "source": "x", "written_by": "y", "schema": 1}
    (empty / layout.IDENTITY).write_text(json.dumps(metadata | {"run": {}, "files": {}}))
    assert newest_checkpoint(run).name == "step_000005"
    assert "step_000100 is damaged" in caplog.text
    assert checkpoint_to_resume(run).name == "step_000005"
    assert (run / "checkpoints" / "step_000100.damaged").is_dir()


def test_imports_that_were_written_without_a_list_are_checked_by_their_metadata(tmp_path):
    checkpoint = tmp_path / "megatron"
    import_checkpoint(hf_folder(tmp_path / "hf"), checkpoint)
    identity = checkpoint / layout.IDENTITY
    identity.write_text(json.dumps(json.loads(identity.read_text()) | {"schema": 1, "files": {}}))
    assert damage(checkpoint) is None
    data = checkpoint / "weights" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    assert "__0_0.distcp has" in damage(checkpoint)
    data.unlink()
    assert damage(checkpoint) == "__0_0.distcp is missing"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_an_export_that_lost_something_on_its_way_is_not_imported(name, tmp_path):
    hf = hf_folder(tmp_path / "hf")
    import_checkpoint(hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", hf, tmp_path / "back")
    (tmp_path / "back" / "README.md").write_text("a better model card")
    require_whole_export(tmp_path / "back")
    content = (tmp_path / "back" / name).read_bytes()
    (tmp_path / "back" / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"is not what was exported \({name} has .*\): export again, or remove"):
        import_checkpoint(tmp_path / "back", tmp_path / "again")
    (tmp_path / "back" / EXPORT_MANIFEST).unlink()
    require_whole_export(tmp_path / "back")
