"""Win rates and scores of published judgments equal the published ones."""

import csv
import io

import pytest

from tests.evaluation.published import ALPACA_EVAL, ARENA_HARD, listed, stored, write
from treg_megatron.evaluation.comparison.arms import read_arm
from treg_megatron.evaluation.comparison.bradley_terry import score, score_interval
from treg_megatron.evaluation.comparison.compare import ALPACA_EVAL_PROMPTS
from treg_megatron.evaluation.comparison.length_control import length_control
from treg_megatron.utils.files import sha256_of_json

ANNOTATIONS = "results/{}/weighted_alpaca_eval_gpt4_turbo/annotations.json"
LEADERBOARD = "src/alpaca_eval/leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv"


def published() -> dict[str, dict[str, str]]:
    content = stored(ALPACA_EVAL, LEADERBOARD)
    assert content is not None
    return {row[""]: row for row in csv.DictReader(io.StringIO(content.decode()))}


def test_raw_win_rates_are_the_leaderboards(tmp_path):
    """Of every model whose annotations are in the clone; some clones leave out large files."""
    compared, ordered = 0, 0
    for name, row in published().items():
        content = stored(ALPACA_EVAL, ANNOTATIONS.format(name)) if name in listed(ALPACA_EVAL, "results") else None
        if content is None:
            continue
        arm = read_arm(write(content, tmp_path / name / "annotations.json"))
        preferences = [one.preference for one in arm.judged.values() if one.preference is not None]
        assert 100 * sum(preferences) / len(preferences) == pytest.approx(float(row["win_rate"]), abs=1e-6), name
        assert len(preferences) == int(row["n_total"])
        compared += 1
        ordered += sha256_of_json(list(arm.judged)) == ALPACA_EVAL_PROMPTS
    assert compared >= 10 and ordered >= 10


@pytest.mark.parametrize(
    ("name", "minimal", "published_one"),
    [
        ("FuseChat-Gemma-2-9B-Instruct", 70.03, 70.18),
        ("FuseChat-Llama-3.1-8B-Instruct", 65.07, 65.39),
        ("alpaca-7b", 19.55, 5.88),  # its answers are a fifth as long as the baseline's
    ],
)
def test_the_minimal_length_control_is_what_the_docs_say(
    tmp_path, alpaca_eval_python, monkeypatch, name, minimal, published_one
):
    content = stored(ALPACA_EVAL, ANNOTATIONS.format(name))
    if content is None:
        pytest.skip(f"the clone lacks the annotations of {name}")
    monkeypatch.setattr("treg_megatron.evaluation.comparison.length_control.ROUNDS", 2)
    arm = read_arm(write(content, tmp_path / "annotations.json"))
    annotations = [
        {
            "generator_1": "baseline",
            "generator_2": "arm",
            "output_1": one.texts.baseline,
            "output_2": one.texts.arm,
            "preference": 1 + one.preference,
        }
        for one in arm.judged.values()
    ]
    found = length_control([annotations], range(len(annotations)), alpaca_eval_python)
    row = published()[name]
    assert found.win_rates == [pytest.approx(float(row["win_rate"]), abs=1e-6)]
    assert found.length_controlled == [pytest.approx(minimal, abs=0.1)]
    assert float(row["length_controlled_winrate"]) == pytest.approx(published_one, abs=0.005)


@pytest.mark.parametrize(
    ("name", "published", "low", "high"),
    [("gpt-4-0613", 37.9, 35.6, 40.36), ("gpt-3.5-turbo-0125", 23.34, 21.67, 25.27)],
)
def test_arena_hards_scores_are_the_published_ones(tmp_path, name, published, low, high):
    """``leaderboard/arena_hard_leaderboard_20240731.csv``; the published ends are of 100 resamples."""
    content = stored(ARENA_HARD, f"data/arena-hard-v0.1/model_judgment/gpt-4-1106-preview/{name}.jsonl")
    if content is None:
        pytest.skip(f"the clone lacks the judgments of {name}")
    arm = read_arm(write(content, tmp_path / f"{name}.jsonl"))
    games = [game for one in arm.judged.values() for game in one.games]
    assert arm.name == name and len(arm.judged) == 500
    assert score(games) == pytest.approx(published, abs=0.006)
    assert score_interval(games) == pytest.approx((low, high), abs=0.6)
