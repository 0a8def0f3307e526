"""The scripts as they are: accepted on nodes of eight H100, clean, and run to the end by two CPU ranks on two nodes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import ROOT, SCRIPTS, assert_complete, log
from tests.support.benchmarks import ALPACA_EVAL, write_rows
from treg_megatron.evaluation.answer_folder import read_answers

SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # of the dev extra


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_sbatch_accepts_the_script_unmodified(script, cluster, tmp_path):
    result = subprocess.run(
        ["sbatch", "--test-only", script], env=cluster.environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0 and "to start at" in result.stderr, result.stderr


def test_shellcheck():
    assert SHELLCHECK, "install the dev extra, or apt-get install shellcheck"
    result = subprocess.run(
        [SHELLCHECK, "-x", "-P", ".", *(ROOT / "slurm").glob("*.sh")], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout


def test_no_directive_asks_for_a_container():
    for script in SCRIPTS:
        assert not [
            line for line in script.read_text().splitlines() if line.startswith("#SBATCH") and "container" in line
        ]


def test_treg_70b_runs_to_its_end(slurm, files, uninterrupted):
    assert_complete(uninterrupted)
    assert uninterrupted.checkpoints() == ["step_000035", "step_000040"]
    job_log = next(
        path
        for path in files.folder.glob("treg_70b-*.log")
        if f"metrics.jsonl in {uninterrupted.folder}\n" in path.read_text()
    )
    assert "nodes: 2 with 1 ranks each, the same packages, all folders visible; all-reduce of" in job_log.read_text()
    assert (
        (job_log.with_suffix(".recipe.yaml")).read_text().count("uninterrupted")
        and "megatron-core==0.15" in job_log.with_suffix(".packages").read_text().replace("_", "-")
        and len(job_log.with_suffix(".commit").read_text()) >= 40
    )


def test_label_index_train_and_export_as_one_chain(slurm, files, uninterrupted):
    """pipeline_70b.sh: label_70b.sh with a model split over both nodes, index.sh, treg_70b.sh, convert.sh."""
    run = files.run("chain")
    said = slurm.run(
        "bash",
        ROOT / "slurm" / "pipeline_70b.sh",
        f"run={files.folder}/chain-made",
        f"model.checkpoint={files.folder}/shared/megatron",
        cwd=files.folder,
        RECIPE=str(run.recipe),
        CHECKS="",
    )
    jobs = dict(word.split() for word in said.split(", "))
    for station in ("label", "index", "train", "export"):
        slurm.wait(jobs[station], "COMPLETED")
    assert_equal_but_for_rounding(run, uninterrupted)
    assert (files.folder / "chain-hf" / "model.safetensors").stat().st_size > 100_000
    assert "exported" in log(files, jobs["export"])


def assert_equal_but_for_rounding(found, expected):
    """The labels were made by another engine: Megatron's log-probs are not Hugging Face's bit for bit."""
    assert [r["step"] for r in found.records()] == [r["step"] for r in expected.records()]
    for ours, theirs in zip(found.records(), expected.records(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_when_a_station_fails_the_rest_of_the_chain_is_cancelled(slurm, files):
    said = slurm.run(
        "bash",
        ROOT / "slurm" / "pipeline_70b.sh",
        f"run={files.folder}/broken",
        "label.pairs=nowhere.jsonl",
        cwd=files.folder,
        RECIPE=str(files.run("broken").recipe),
        CHECKS="",
    )
    jobs = dict(word.split() for word in said.split(", "))
    slurm.wait(jobs["label"], "FAILED")
    assert "error: pairs file nowhere.jsonl cannot be read" in log(files, jobs["label"])
    for station in ("index", "train", "export"):
        slurm.wait(jobs[station], "CANCELLED", seconds=30)


@pytest.mark.parametrize("script, nodes", [("treg_8b", 1), ("treg_405b", 36)])
def test_training_scripts_run_to_their_ends(script, nodes, slurm, files):
    """The 8B job has one node: it runs two ranks there."""
    run = files.run(script, max_steps=6)
    shape = {"NODES": "1", "RANKS": "2"} if nodes == 1 else {}
    job = slurm.submit(
        ROOT / "slurm" / f"{script}.sh",
        "parallel.pipeline=1",
        "parallel.tensor=2",
        cwd=files.folder,
        RECIPE=str(run.recipe),
        CHECKS="",
        **shape,
    )
    slurm.wait(job, "COMPLETED")
    assert run.step() == 6 and slurm.field(job, "NumNodes") == str(nodes)


def test_sample_8b_runs_to_its_end(slurm, files):
    job = slurm.submit(
        ROOT / "slurm" / "sample_8b.sh",
        f"run={files.folder}/sampled",
        cwd=files.folder,
        NODES="1",
        RECIPE=str(files.run("sample").recipe),
        PYTHONPATH=str(files.folder),
    )
    slurm.wait(job, "COMPLETED")
    assert (files.folder / "sampled" / "pairs.jsonl").read_text().count("\n") > 10


def test_evaluate_answers_by_two_ranks(slurm, files):
    prompts = write_rows(files.folder / "alpaca_eval.json", ALPACA_EVAL)
    output = files.folder / "answered"
    job = slurm.submit(
        ROOT / "slurm" / "evaluate.sh",
        f"evaluate.model={files.folder}/hf",
        f"evaluate.prompts={prompts}",
        f"evaluate.output={output}",
        *("evaluate.dtype=float32", "evaluate.max_new_tokens=4", "evaluate.shard_prompts=1"),
        cwd=files.folder,
        RECIPE=str(files.run("evaluated").recipe),
        NODES="1",
        RANKS="2",
    )
    slurm.wait(job, "COMPLETED")
    assert (
        len(read_answers(output).rows) == len(ALPACA_EVAL) == len(json.loads((output / "alpaca_eval.json").read_text()))
    )
    assert "answered 7 prompts of alpaca_eval" in log(files, job)


def test_convert_imports(slurm, files):
    checkpoint = files.folder / "imported"
    job = slurm.submit(
        ROOT / "slurm" / "convert.sh",
        "import",
        f"model.checkpoint={checkpoint}",
        cwd=files.folder,
        RECIPE=str(files.run("import").recipe),
    )
    slurm.wait(job, "COMPLETED")
    assert (checkpoint / "treg.json").exists()
