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


def test_the_full_form_takes_difficulties_by_position(arms, alpaca_eval_python, tmp_path):
    """Of prompts 1 to 120 here; that of prompt 0 is never looked up."""
    table = tmp_path / "df_gamed.csv"
    generator = np.random.default_rng(1)
    with open(table, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["preference", "index", "std_delta_len", "instruction_difficulty", "model", "not_gamed_baseline"]
        )
        for name in ("concise", "verbose"):
            for index in range(121):
                difficulty = 1e6 if index == 0 else 0.2 * (index % 5)
                writer.writerow([generator.random(), index, generator.normal(), difficulty, name, False])
    found = length_control(arms, range(1, 121), alpaca_eval_python, gamed=table)
    assert found.form == "full" and 0 < found.length_controlled[0] < 100
    assert found.length_controlled != length_control(arms, range(1, 121), alpaca_eval_python).length_controlled


def test_a_failure_is_one_line(arms, alpaca_eval_python, tmp_path):
    (tmp_path / "df_gamed.csv").write_text("nothing\n")
    with pytest.raises(UserError, match=r"alpaca_eval in .* fails: KeyError.*model") as refused:
        length_control(arms, range(120), alpaca_eval_python, gamed=tmp_path / "df_gamed.csv")
    assert "\n" not in str(refused.value)


def test_a_relative_interpreter_is_found(arms, alpaca_eval_python):
    relative = os.path.relpath(alpaca_eval_python)
    assert length_control(arms[:1], range(120), relative).form == "minimal"
