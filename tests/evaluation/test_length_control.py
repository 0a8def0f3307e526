"""Length-controlled win rates by the package alpaca_eval itself."""

import csv
import os

import numpy as np
import pytest

from tests.support.judged import annotations
from treg_megatron.errors import UserError
from treg_megatron.evaluation.comparison import length_control as module
from treg_megatron.evaluation.comparison.length_control import length_control


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(module, "ROUNDS", 3)


@pytest.fixture
def arms():
    """One that wins whatever its length, and one that wins where its answers are longer, which most are."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(30, 110, 120)  # the baseline's answers have 50 characters
    steady = 1 + generator.beta(3, 2, 120)
    longer = 1 + np.clip((lengths - 50) / 60 + 0.5, 0, 1)
    return [
        annotations(name, preferences.tolist(), lengths.tolist())
        for name, preferences in (("steady", steady), ("longer", longer))
    ]


def test_the_minimal_form(arms, alpaca_eval_python):
    found = length_control(arms, range(120), alpaca_eval_python)
    raw = [100 * np.mean([row["preference"] - 1 for row in arm]) for arm in arms]
    assert found.form == "minimal" and found.win_rates == pytest.approx(raw)
    steady, longer = found.length_controlled
    assert steady == pytest.approx(raw[0], abs=3)
    assert raw[1] > 65 and longer == pytest.approx(50, abs=5)  # as long as the baseline's, they win half of the time
    assert found.resampled.shape == (2, 3) and len(set(found.resampled[0])) == 3


def test_what_is_computed_does_not_depend_on_the_other_arms(arms, alpaca_eval_python):
    both = length_control(arms, range(120), alpaca_eval_python)
    alone = length_control(arms[1:], range(120), alpaca_eval_python)
    assert both.length_controlled[1] == alone.length_controlled[0]
    assert both.resampled[1].tolist() == alone.resampled[0].tolist()


def write_difficulties(path, prompts_before):
    """df_gamed.csv of 120 prompts and of others before them, on which the two regularising models were not judged."""
    generator = np.random.default_rng(1)
    columns = ["preference", "index", "std_delta_len", "instruction_difficulty", "model", "not_gamed_baseline"]
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        for name in ("concise", "verbose"):
            for before in range(prompts_before):
                writer.writerow(["", before, 0.0, 1000.0, name, False])
            for number in range(120):
                preference, length, difficulty = generator.random(), generator.normal(), 0.2 * (number % 5)
                writer.writerow([preference, prompts_before + number, length, difficulty, name, False])
    return path


def test_the_full_form_takes_difficulties_by_position(arms, alpaca_eval_python, tmp_path):
    found = length_control(arms, range(120), alpaca_eval_python, write_difficulties(tmp_path / "all.csv", 0))
    later = length_control(arms, range(3, 123), alpaca_eval_python, write_difficulties(tmp_path / "more.csv", 3))
    assert found.form == "full" and found.length_controlled == pytest.approx(later.length_controlled, abs=1e-6)
    minimal = length_control(arms, range(120), alpaca_eval_python)
    assert abs(found.length_controlled[1] - minimal.length_controlled[1]) > 0.1


def test_a_failure_is_one_line(arms, alpaca_eval_python, tmp_path):
    (tmp_path / "df_gamed.csv").write_text("nothing\n")
    with pytest.raises(UserError, match=r"alpaca_eval in .* fails: KeyError.*model") as refused:
        length_control(arms, range(120), alpaca_eval_python, gamed=tmp_path / "df_gamed.csv")
    assert "\n" not in str(refused.value)


def test_a_relative_interpreter_is_found(arms, alpaca_eval_python):
    relative = os.path.relpath(alpaca_eval_python)
    assert length_control(arms[:1], range(120), relative).form == "minimal"
