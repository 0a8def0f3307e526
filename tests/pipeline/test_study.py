"""A small miniature study from scratch to its report: the shapes of the results, and reproducibility to the byte."""

import csv
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from studies.miniature import warm
from studies.miniature.configuration import FORMS, load_study
from studies.miniature.pipeline import REFERENCE, credit_path, result_path
from tests.pipeline.conftest import ROOT, assert_refused

SMOKE = ROOT / "studies" / "miniature" / "smoke.yaml"
PROGRAM = "studies.miniature.run"
SAMPLED = {"sampled/score": 2, "sampled/length": 2, "kl": 2}
GREEDY = {"greedy/score": 1, "greedy/length": 1}


def conduct(path: Path) -> str:
    """Run the study in a process forked from this one, which imports NeMo once for all; return what it printed."""
    log = path.with_suffix(".log")
    log.unlink(missing_ok=True)
    warm.warm_up()
    warm.step(PROGRAM, "--study", path, log=log)
    return log.read_text()


def refused(path: Path, pattern: str) -> None:
    """Assert that the command refuses a study, before it imports anything heavy."""
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM, "--study", str(path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert_refused(done, pattern)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    path = folder / "study.yaml"
    path.write_text(
        yaml.safe_dump(
            {"defaults": str(SMOKE), "run": str(folder / "run"), "seeds": [1], "report": str(folder / "STUDY.md")}
        )
    )
    return path


@pytest.fixture(scope="module")
def study(settings):
    conduct(settings)
    return load_study(settings)


def test_steps_find_what_they_import(study):
    """Else each of a thousand steps would import NeMo or transformers for itself."""
    needed = {"nemo.lightning", "treg_megatron.training.callbacks.metrics", "transformers.models.llama.modeling_llama"}
    assert needed <= sys.modules.keys()


def test_every_run_has_every_measurement(study):
    for reference in study.references:
        choice = json.loads((reference.folder / "choice.json").read_text())
        expected = {
            "dev": (SAMPLED, reference.search_runs),
            "test": (SAMPLED | GREEDY, reference.final_runs(choice)),
        }
        for split, (per_prompt, runs) in expected.items():
            prompts, credit = study.world["prompts"][split], np.load(credit_path(reference, split))
            assert {f"reward/{form}" for form in FORMS} < set(credit.files) and credit["prompt"].max() < prompts
            assert len({credit[name].shape for name in credit.files}) == 1
            for name in (REFERENCE, *(run.name for run in runs)):
                with np.load(result_path(reference, name, split)) as result:
                    assert {what: result[what].shape for what in per_prompt} == {
                        what: (prompts, answers) for what, answers in per_prompt.items()
                    }, name
                    assert result["sampled/results"].shape == (prompts, 2, 4)
                    assert all(np.isfinite(result[what]).all() for what in result.files)
                    if split == "test":
                        assert result["implicit"].shape == credit["right"].shape
                        moved = np.abs(result["implicit"]).max()
                        assert moved < 1e-4 if name == REFERENCE else moved > 1e-3


def test_token_rewards_differ_by_source(study):
    """The frozen policy's labels are neither the reference's nor the verifier's, and those of both requests differ."""
    for reference in study.references:
        rewards = [
            np.fromfile(next((reference.folder / "streams").glob(f"{name}_*reward*.bin")), np.float32)
            for name in ("train", "truth", "oracle")
        ]
        assert len({len(each) for each in rewards}) == 1
        assert all(np.abs(one - other).max() > 1e-3 for one, other in zip(rewards, rewards[1:] + rewards[:1]))
        credit = np.load(credit_path(reference, "test"))
        assert np.abs(credit["reward/revise"] - credit["reward/revise_turn"]).max() > 1e-3


def test_report_has_every_run_and_its_pictures(study):
    text = study.report.read_text()
    for method in study.methods:
        assert (
            text.count(f"\n| {method} | ") >= 4
        )  # settings, measures, error rates, search; dpo and dpo_reg are compared once
    for other in ("dpo", "dpo_reg"):
        assert f"* Higher than `{other}` with every reference: " in text
    assert "nan" not in text and "under both readings" in text
    for name in ("differences", "curves", "tokens", "search"):
        assert f"(study/{name}.png)" in text and (study.report.parent / "study" / f"{name}.png").stat().st_size > 5000
    runs = list(csv.DictReader((study.report.parent / "study" / "runs.csv").open()))
    assert len(runs) == len(study.references) * len(study.methods) * 2 == len({tuple(run.values()) for run in runs})


def test_a_lost_result_is_reproduced_bit_for_bit(settings, study):
    reference = study.references[1]
    name = next(run.name for run in reference.search_runs if run.method == "implicit_frozen")
    lost, report = result_path(reference, name, "dev"), study.report.read_text()
    before = lost.read_bytes()
    lost.unlink()
    said = conduct(settings)
    assert lost.read_bytes() == before and study.report.read_text() == report
    assert f"run 1 of 1: {reference.name}/{name}" in said


def test_two_studies_in_one_folder_are_refused(settings, study):
    with open(study.run / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused(settings, "a study is running in")


def test_another_world_is_refused(settings, study):
    keys = yaml.safe_load(settings.read_text()) | {"world": {"seed": 1}}
    changed = settings.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(keys))
    refused(changed, "changed since .* was started; start over with")
