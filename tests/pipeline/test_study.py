"""A small miniature study from scratch to its report: the shapes of the results, and reproducibility to the byte."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from studies.miniature.configuration import load_study
from studies.miniature.pipeline import REFERENCE, result_path
from tests.pipeline.conftest import ROOT, assert_refused

SMOKE = ROOT / "studies" / "miniature" / "smoke.yaml"
PER_PROMPT = {"greedy/score": 1, "greedy/length": 1, "sampled/score": 2, "sampled/length": 2, "kl": 2}


def conduct(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "studies.miniature.run", "--study", str(path)],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=800,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


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
    done = conduct(settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return load_study(settings)


def test_every_run_has_every_measurement(study):
    choice = json.loads((study.run / "choice.json").read_text())
    expected = {
        "dev": [REFERENCE, *(run.name for run in study.search_runs)],
        "test": [REFERENCE, *(run.name for run in study.final_runs(choice))],
    }
    for split, names in expected.items():
        prompts, right = study.world["prompts"][split], np.load(study.run / "credit" / f"{split}.npz")["right"]
        for name in names:
            with np.load(result_path(study, name, split)) as result:
                assert {what: result[what].shape for what in PER_PROMPT} == {
                    what: (prompts, answers) for what, answers in PER_PROMPT.items()
                }, name
                assert result["sampled/results"].shape == (prompts, 2, 4) and result["implicit"].shape == right.shape
                assert all(np.isfinite(result[what]).all() for what in result.files)
                moved = np.abs(result["implicit"]).max()
                assert moved < 1e-4 if name == REFERENCE else moved > 1e-3


def test_report_has_every_run_and_its_pictures(study):
    text = study.report.read_text()
    sections = text.split("\n## ")
    for method in study.methods:
        assert f"\n| {method} | 1 |" in sections[-1]
        assert text.count(f"\n| {method} | ") >= 4  # measures, error rates, search, runs
    assert "nan" not in text and "not distinguishable" in text
    for name in ("curves", "tokens"):
        assert f"(study/{name}.png)" in text and (study.report.parent / "study" / f"{name}.png").stat().st_size > 5000


def test_a_lost_result_is_reproduced_bit_for_bit(settings, study):
    name = next(run.name for run in study.search_runs if run.method == "dpo_reg_0.5")
    lost, report = result_path(study, name, "dev"), study.report.read_text()
    before = lost.read_bytes()
    lost.unlink()
    again = conduct(settings)
    assert again.returncode == 0, again.stderr
    assert lost.read_bytes() == before and study.report.read_text() == report
    assert f"run 1 of 1: {name}" in again.stdout


def test_two_studies_in_one_folder_are_refused(settings, study):
    with open(study.run / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert_refused(conduct(settings), "a study is running in")


def test_another_world_is_refused(settings, study):
    keys = yaml.safe_load(settings.read_text()) | {"world": {"seed": 1}}
    changed = settings.with_name("changed.yaml")
    changed.write_text(yaml.safe_dump(keys))
    assert_refused(conduct(changed), "changed since .* was started; start over with")
