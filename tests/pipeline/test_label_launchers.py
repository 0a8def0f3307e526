"""label_tokens.py started directly, by torchrun and as by srun, with either engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.conftest import PAIRS, ROOT, run_command
from tests.support.file_operations import contents
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.data.labelled_pairs import SIDES, read_labelled


@pytest.fixture(scope="module")
def folder(tiny_hf, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return folder


def command(tiny_hf: Path, folder: Path, output: str, *more: str) -> list:
    return [
        "tools/label_tokens.py",
        "--recipe",
        "recipes/tiny.yaml",
        "--model",
        tiny_hf,
        "--output",
        folder / output,
        "--pairs",
        folder / "pairs.jsonl",
        "--shard-pairs",
        "2",
        *more,
    ]


@pytest.fixture(scope="module")
def alone(tiny_hf, folder) -> Path:
    """Output of a single process."""
    result = run_command(*command(tiny_hf, folder, "alone"))
    assert result.returncode == 0 and result.stdout.startswith(f"labelled {len(PAIRS)} pairs to "), result.stderr
    return folder / "alone"


def test_under_torchrun(tiny_hf, folder, alone):
    result = run_command(*command(tiny_hf, folder, "torchrun"), ranks=2)
    assert result.returncode == 0 and "labelled 12 pairs" in result.stdout, result.stderr
    assert contents(folder / "torchrun") == contents(alone)


def test_under_srun(tiny_hf, folder, alone):
    tasks = [
        subprocess.Popen(
            [sys.executable, *map(str, command(tiny_hf, folder, "srun"))],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
            },
        )
        for rank in range(2)
    ]
    printed = [task.communicate(timeout=200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0] and "labelled 12 pairs" in "".join(printed)
    assert contents(folder / "srun") == contents(alone)


def test_bad_input_is_reported_once_under_torchrun(tiny_hf, folder):
    (folder / "broken.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n')
    result = run_command(*command(tiny_hf, folder, "refused", "--pairs", folder / "broken.jsonl"), ranks=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode != 0 and len(errors) == 1 and "broken.jsonl" in errors[0] and "row 1" in errors[0]
    assert not (folder / "refused").exists()


def test_megatron_engine_with_tensor_parallel_2(tiny_hf, folder, alone):
    import_checkpoint(tiny_hf, folder / "megatron")
    result = run_command(
        *command(
            tiny_hf, folder, "split", "--engine", "megatron", "--checkpoint", folder / "megatron", "--tensor", "2"
        ),
        ranks=2,
    )
    assert result.returncode == 0 and result.stdout.count("labelled 12 pairs") == 1, result.stderr
    for ours, theirs in zip(read_labelled(folder / "split"), read_labelled(alone), strict=True):
        assert ours.pair_id == theirs.pair_id
        for side in SIDES:
            for values in (f"{side}_ref_logprobs", f"{side}_token_rewards"):
                np.testing.assert_allclose(getattr(ours, values), getattr(theirs, values), atol=1e-4)
