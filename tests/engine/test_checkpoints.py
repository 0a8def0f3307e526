"""Checkpoints that were written on Transformer Engine's layers load on PyTorch's, and the reverse; both export."""

import dataclasses
from pathlib import Path

import pytest

from tests.support.checkpoints import assert_same_tensors, certify
from tests.support.engine_ranks import load_and_describe, resave
from tests.support.forked import run_ranks
from treg_megatron.checkpoint.layout import WEIGHTS, read_metadata
from treg_megatron.checkpoint.to_hf import export_checkpoint


def saved(checkpoint: Path, folder: Path, engine: bool) -> Path:
    """The checkpoint in bf16, loaded and saved on two tensor-parallel ranks."""
    (folder / WEIGHTS).mkdir(parents=True)
    run_ranks(2, resave, checkpoint, folder / WEIGHTS, engine, 2)
    return certify(folder, dataclasses.replace(read_metadata(checkpoint), dtype="bfloat16"))


#: between them, every kind of parameter: biases, norms of queries and keys, experts alone and in groups
@pytest.mark.parametrize(
    "family, engine",
    [("Qwen2", True), ("Qwen3", True), ("Mixtral", True), ("Mixtral", False), ("Qwen3Moe", True), ("Qwen3Moe", False)],
)
def test_layers_read_what_the_others_wrote(family, engine, checkpoints, tmp_path):
    first = run_ranks(1, load_and_describe, checkpoints[family], 1)[0]
    written = saved(checkpoints[family], tmp_path / "written", engine)
    for before, after in zip(first, run_ranks(1, load_and_describe, written, 1)[0], strict=True):
        assert before.parameters.keys() == after.parameters.keys()
        assert all(before.parameters[name].equal(after.parameters[name]) for name in before.parameters)
    hf = checkpoints[family].parent / "hf"
    export_checkpoint(written, hf, tmp_path / "exported")
    export_checkpoint(checkpoints[family], hf, tmp_path / "expected", dtype="bfloat16")
    assert_same_tensors(tmp_path / "exported", tmp_path / "expected")
