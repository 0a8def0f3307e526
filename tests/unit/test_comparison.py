"""Comparison of arms: what is read, what is refused, and the figures."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from tests.support.judged import annotations, arena_hard, as_jsonl, judgments_folder
from tests.support.judging_server import alpaca_eval_file
from treg_megatron.cli import main
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.errors import UserError
from treg_megatron.evaluation.comparison import compare as comparing
from treg_megatron.evaluation.comparison.arms import Texts, read_arm, read_arms
from treg_megatron.evaluation.comparison.bradley_terry import Game
from treg_megatron.evaluation.comparison.compare import FORMAT, VERSION, compare
from treg_megatron.evaluation.comparison.length_control import LengthControl, Unavailable, length_control
from treg_megatron.evaluation.intervals import mean_interval
from treg_megatron.evaluation.judge import judge
from treg_megatron.evaluation.reporting.text import as_text
from treg_megatron.utils.files import read_manifest, write_manifest

GOOD, BAD = [0.9, 0.5, 1.0, 0.2, 0.7], [0.4, 0.5, 0.9, 0.3, 0.1]


@pytest.fixture(autouse=True)
def without_alpaca_eval(monkeypatch):
    """The environment of the tests may or may not have it."""

    def missing(*_, **__):
        raise Unavailable("it is not installed")

    monkeypatch.setattr(comparing, "length_control", missing)


@pytest.fixture
def two(tmp_path) -> list[Path]:
    return [judgments_folder(tmp_path / "a", "good", GOOD), judgments_folder(tmp_path / "b", "bad", BAD)]


# --- what is read


def by_length(messages, responses):
    return [len(response) for response in responses]


def test_what_treg_judge_writes_is_read_with_the_answers(tmp_path):
    """Its folder, of answers in AlpacaEval's form, judged by a function."""
    for name, words in (("one", [3, 9, 5]), ("two", [8, 1, 5]), ("base", [5, 4, 5])):
        (tmp_path / f"{name}.json").write_text(json.dumps(alpaca_eval_file(name, words)))
    paths = []
    for name in ("one", "two"):
        overrides = {
            "arm": tmp_path / f"{name}.json",
            "baseline": tmp_path / "base.json",
            "output": tmp_path / name,
            "kind": "function",
            "function": f"{__name__}:by_length",
        }
        recipe = load_recipe(overrides=[f"judge.{key}={value}" for key, value in overrides.items()])
        judge(section(recipe, "judge"))
        paths.append(tmp_path / name)
    arm = read_arm(paths[0])
    assert [one.texts for one in arm.judged.values()][1] == Texts("one1" + " word" * 9, "base1" + " word" * 4)
    found = compare(paths)
    assert found["judge"]["kind"] == "function" and found["baseline"] == "base"
    assert found["arms"][0]["answers"] == str(tmp_path / "one.json")
    (difference,) = found["differences"]
    assert (difference["wins"], difference["losses"]) == (1, 1)


def test_alpaca_evals_annotations(tmp_path):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations("good", [2.0, 1.0, 1.5, 0, 1.25, None, float("nan")])))
    arm = read_arm(path)
    assert [one.preference for one in arm.judged.values()] == [1.0, 0.0, 0.5, 0.5, 0.25, None, None]
    assert (arm.name, arm.baseline, arm.judge["name"]) == ("good", {"name": "base"}, "rule")
    assert next(iter(arm.judged.values())).texts == Texts("a" * 40, "b" * 50)
    assert arm.mean_characters == pytest.approx(np.mean([40 + number % 7 for number in range(7)]))


def test_annotations_and_a_folder_of_the_same_prompts_have_the_same_ids_and_hash(tmp_path, two):
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations("good", [2.0] * len(GOOD))))
    arm, other = read_arm(path), read_arm(two[0])
    assert list(arm.judged) == list(other.judged) and arm.prompts_sha256 == other.prompts_sha256


@pytest.mark.parametrize("named", [{}, {"category": "arena-hard-v0.1", "baseline": "gpt-4-0314"}], ids=["first", "now"])
def test_arena_hards_judgments(tmp_path, named):
    """The baseline is A in the first game and B in the second; a pair that lacks a verdict is not judged."""
    rows = arena_hard("good", [("B>>A", "A>B"), ("A>B", "B>>A"), ("A=B", "A=B"), ("A>B", None)], **named)
    arm = read_arm(as_jsonl(rows, tmp_path / "good.jsonl"))
    games = [one.games for one in arm.judged.values()]
    assert games[:2] == [(Game(1.0, 3), Game(1.0, 1)), (Game(0.0, 1), Game(0.0, 3))]
    assert [one.preference for one in arm.judged.values()] == [1.0, 0.0, 0.5, None]
    assert (arm.benchmark, arm.baseline) == ("arena_hard_v0.1", {"name": "gpt-4-0314"})


def test_arena_hard_v2_is_compared_by_category(tmp_path):
    hard = arena_hard("good", [("A>B", "B>A")], category="hard_prompt", baseline="o3")
    creative = arena_hard("good", [("B>A", "A>B")] * 2, category="creative_writing", baseline="gemini")[1:]
    path = as_jsonl(hard + creative, tmp_path / "good.jsonl")
    with pytest.raises(UserError, match="category is creative_writing, hard_prompt; compare one at a time"):
        read_arm(path)
    arm = read_arm(path, "creative_writing")
    assert (arm.benchmark, arm.baseline["name"], len(arm.judged)) == ("arena_hard_v2", "gemini", 1)
    with pytest.raises(UserError, match="no judgments of the category math"):
        read_arm(path, "math")


def test_a_run_tells_its_recipe_objective_accuracy_and_divergence(tmp_path):
    run = tmp_path / "run"
    judgments_folder(run / "evaluate" / "judgments", "good", GOOD)
    (run / "train").mkdir()
    OmegaConf.save(load_recipe("recipes/tiny.yaml", ["objective.alpha=0.5"]), run / "train" / "recipe.yaml")
    (run / "evaluate" / "accuracy").mkdir()
    figures = {
        "pairs": 40,
        "implicit_reward_accuracy": 0.75,
        "implicit_reward_accuracy_interval": [0.6, 0.9],
        "log_prob_accuracy": 0.5,
    }
    write_manifest(
        run / "evaluate" / "accuracy" / "accuracy.json",
        "treg-megatron accuracy",
        1,
        {"subsets": {"all": figures}, "kl": {"nats_per_token": 0.02, "nats_per_token_interval": [0.01, 0.03]}},
    )
    (arm,) = compare([run])["arms"]
    assert (arm["run"], arm["checkpoint"]) == (str(run), None)
    assert arm["recipe"] == str(run / "train" / "recipe.yaml") and arm["objective"]["alpha"] == 0.5
    assert arm["accuracy"] == {"implicit_reward": 0.75, "log_prob": 0.5, "pairs": 40, "interval": [0.6, 0.9]}
    assert arm["kl"] == {"nats_per_token": 0.02, "interval": [0.01, 0.03]}


def test_the_run_of_judgments_elsewhere_is_that_of_the_answers(tmp_path):
    answers = tmp_path / "run" / "evaluate" / "answers"
    arm = read_arm(judgments_folder(tmp_path / "by_another_judge", "good", GOOD, answers=answers))
    assert arm.folders["run"] == tmp_path / "run"


def test_arms_of_one_name_are_told_apart_by_their_paths(tmp_path):
    paths = [judgments_folder(tmp_path / name, "same", GOOD) for name in "ab"]
    assert [arm.name for arm in read_arms(paths)] == [f"same ({path})" for path in paths]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"preference": 2, "generator_1": "a", "generator_2": "b"}], "row 1 is no annotation of alpaca_eval"),
        (annotations("a", [1.0, 2.5]), "row 2 is no annotation.* 2.5 is neither 0 nor from 1 to 2"),
        (annotations("a", [1.0]) * 2, "judges prompt [0-9a-f]+ twice"),
        (annotations("a", [1.0]) + annotations("b", [1.0, 1.0])[1:], "generator_2 is a, b"),
        ([{"model": "a", "uid": "1", "games": [1]}], "row 1 is no judgment of Arena-Hard"),
        ([{"winner": "model_a"}], "no judgments of a form that can be read"),
        ([], "no judgments of a form that can be read"),
    ],
)
def test_files_that_hold_no_judgments_are_refused(tmp_path, rows, message):
    path = tmp_path / "file.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(UserError, match=message):
        read_arm(path)


def test_a_path_without_judgments_is_told_what_to_do(tmp_path):
    with pytest.raises(UserError, match="holds no judgments: .*run `treg judge` first"):
        read_arm(tmp_path)
    with pytest.raises(UserError, match="nothing does not exist"):
        read_arm(tmp_path / "nothing")


# --- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benchmark": "mt_bench"}, "the benchmark is alpaca_eval and mt_bench"),
        ({"prompts_sha256": "0"}, "prompts of the same ids have different texts"),
        ({"judge": {"kind": "reward_model", "name": "other"}}, "judge.name is rule and other"),
        ({"judge": {"kind": "reward_model", "name": "rule", "revision": "2"}}, "judge.revision is 1 and 2"),
        ({"baseline": {"name": "other", "sha256": None, "settings": None}}, "baseline.name is base and other"),
        ({"baseline": {"name": "base", "sha256": "x", "settings": None}}, "baseline.sha256 is of the baseline and x"),
        ({"arm": {"settings": {"temperature": 0.7}}}, "settings.temperature is 0.0 and 0.7"),
    ],
)
def test_arms_that_differ_in_more_than_the_model_are_refused(tmp_path, two, changes, message):
    manifest = json.loads((two[1] / "manifest.json").read_text())
    for key, value in changes.items():
        both = isinstance(value, dict) and key != "judge"
        manifest[key] = {**manifest[key], **value} if both else value
    (two[1] / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"good and bad cannot be compared: {message}"):
        compare(two)


def test_arms_of_other_prompts_are_refused(tmp_path, two):
    more = judgments_folder(tmp_path / "more", "more", [*GOOD, 0.5])
    with pytest.raises(UserError, match="0 prompts are only in the first and 1 only in the second, such as [0-9a-f]+"):
        compare([two[0], more])


def test_what_is_unknown_of_an_arm_is_not_compared(tmp_path):
    """A file of alpaca_eval names neither settings nor the baseline's hash."""
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(annotations("other", [1 + value for value in BAD])))
    judge = {"kind": "alpaca_eval", "name": "rule", "alpaca_eval": "0.6.6"}
    folder = judgments_folder(tmp_path / "a", "good", GOOD, judge=judge)
    assert [arm["name"] for arm in compare([folder, path])["arms"]] == ["good", "other"]


# --- the figures


def test_win_rates_and_their_difference(two):
    found = compare(two)
    good, bad = (np.array(values) for values in (GOOD, BAD))
    for arm, values in zip(found["arms"], (good, bad)):
        assert arm["win_rate"] == pytest.approx(100 * values.mean())
        assert arm["win_rate_interval"] == pytest.approx(100 * np.array(mean_interval(values)))
        assert (arm["mean_tokens"], arm["mean_characters"], arm["truncated_share"]) == (12.5, 43.0, 0.2)
    (difference,) = found["differences"]
    assert difference["win_rate"] == pytest.approx(100 * (good - bad).mean())
    assert difference["interval"] == pytest.approx(100 * np.array(mean_interval(good - bad)))
    assert [difference[key] for key in ("wins", "losses", "ties", "sign_test_p")] == [3, 1, 1, 0.625]


def test_a_prompt_that_the_judge_failed_on_is_left_out_for_all(tmp_path, two, caplog):
    failed = judgments_folder(tmp_path / "c", "failed", [None, 0.5, 0.5, None, 0.5])
    with caplog.at_level(logging.WARNING):
        found = compare([two[0], failed])
    assert (found["prompts"], found["left_out"]) == (3, 2) and "2 of 5 prompts are left out" in caplog.text
    assert found["arms"][0]["win_rate"] == pytest.approx(100 * np.mean([0.5, 1.0, 0.7]))
    nothing = judgments_folder(tmp_path / "d", "nothing", [None] * 5)
    with pytest.raises(UserError, match="nothing to compare"):
        compare([two[0], nothing])


def test_arena_hards_scores_weigh_clear_verdicts(tmp_path):
    paths = [
        as_jsonl(arena_hard("good", [("B>>A", "A>B"), ("A>B", "A=B")] * 20), tmp_path / "good.jsonl"),
        as_jsonl(arena_hard("bad", [("A>>B", "A>B"), ("A=B", "A=B")] * 20), tmp_path / "bad.jsonl"),
    ]
    found = compare(paths)
    good, bad = found["arms"]
    assert good["score"] == pytest.approx(100 * (3 + 1 + 0 + 0.5) / 6)
    assert bad["score"] == pytest.approx(100 * (0 + 1 + 0.5 + 0.5) / 6)
    assert good["win_rate"] == pytest.approx(100 * (1 + 0.25) / 2)  # a prompt counts once
    assert good["score_interval"][0] < good["score"] < good["score_interval"][1]
    assert "resampling single games" in as_text(found)
    (difference,) = found["differences"]
    assert difference["score"] == pytest.approx(good["score"] - bad["score"])
    low, high = difference["score_interval"]
    assert low < difference["score"] < high


def test_the_verdicts_of_a_folder_count_only_if_they_are_arena_hards(tmp_path):
    orders = [[{"arm_first": True, "preference": 1.0, "verdict": "A>>B"}]] * len(GOOD)
    other = judgments_folder(tmp_path / "a", "a", GOOD, orders)
    arena = judgments_folder(tmp_path / "b", "b", GOOD, orders, judge={"kind": "arena_hard", "name": "rule"})
    assert compare([other])["arms"][0]["score"] is None
    assert compare([arena])["arms"][0]["score"] == 100.0


def test_length_control_gets_both_answers_and_its_draws_are_paired(tmp_path, monkeypatch):
    paths = []
    for name, preferences in (("good", GOOD), ("bad", BAD)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(annotations(name, [1 + value for value in preferences])))
    asked = []

    def fitted(arms, positions, python, gamed):
        asked.append((arms, positions, python, gamed))
        return LengthControl("minimal", "1.0", [50.0] * 2, [60.0, 40.0], np.array([[61.0, 59.0], [41.0, 39.0]]))

    monkeypatch.setattr(comparing, "length_control", fitted)
    found = compare(paths, alpaca_eval_python="python")
    arms, positions, python, gamed = asked[0]
    assert (positions, python, gamed) == ([0, 1, 2, 3, 4], "python", None)
    assert arms[1][3] == {
        "generator_1": "baseline",
        "generator_2": "arm",
        "output_1": "b" * 50,
        "output_2": "a" * 43,
        "preference": pytest.approx(1 + BAD[3]),
    }
    assert [arm["length_controlled"] for arm in found["arms"]] == [60.0, 40.0]
    assert found["differences"][0]["length_controlled_interval"] == [20.0, 20.0]
    assert found["length_control"]["form"] == "minimal" and "not what its leaderboard shows" in as_text(found)


def test_without_alpaca_eval_or_answers_the_length_control_is_absent_and_says_why(two, monkeypatch):
    found = compare(two)
    assert [arm["length_controlled"] for arm in found["arms"]] == [None, None]
    assert found["length_control"]["form"] == "none"
    assert "the answers of good or of its baseline are not at hand" in found["length_control"]["note"]


def test_a_length_control_that_was_asked_for_and_cannot_be_had_is_an_error(two):
    with pytest.raises(UserError, match="cannot be computed: the answers of good or of its baseline are not at hand"):
        compare(two, alpaca_eval_python=sys.executable)


def test_difficulties_belong_to_alpaca_evals_own_prompts(two, tmp_path):
    with pytest.raises(UserError, match="df_gamed.csv does not exist"):
        compare(two, gamed=tmp_path / "df_gamed.csv")
    (tmp_path / "df_gamed.csv").touch()
    with pytest.raises(UserError, match="is about the 805 prompts of AlpacaEval in order; good has others"):
        compare(two, gamed=tmp_path / "df_gamed.csv")


def test_interpreters_without_alpaca_eval(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no_python: No such file"):
        length_control([[]], [], python=str(tmp_path / "no_python"))
    empty = tmp_path / "empty"
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    empty.chmod(0o755)
    with pytest.raises(UserError, match="empty has no alpaca_eval: run .*empty -m pip install alpaca-eval"):
        length_control([[]], [], python=str(empty))
    monkeypatch.setattr(sys, "executable", str(empty))
    with pytest.raises(Unavailable, match="alpaca_eval is not installed; pip install alpaca-eval"):
        length_control([[]], [])


# --- what is shown and written


def test_the_tables_show_what_arms_differ_in(two):
    found = compare(two)
    for arm, alpha in zip(found["arms"], (0.5, 0.25)):
        arm["objective"] = {"loss_type": "dpo", "alpha": alpha, "beta": 0.1, "gamma": alpha}
    found["arms"][0]["name"] = "good\x1b[2J"
    text = as_text(found)
    heading, first, second = text.splitlines()[:3]
    assert heading.index("alpha") + len("alpha") == first.index(" 0.5") + len(" 0.5") == second.index("0.25") + 4
    assert heading.split()[:4] == ["arm", "loss_type", "alpha", "gamma"] and "beta" not in heading
    assert "\x1b" not in text and first.split()[:4] == ["good\\x1b[2J", "dpo", "0.5", "0.5"]
    assert "66.0 [" in first and "44.0 [" in second and "Arena-Hard" not in text and "KL" not in text


@pytest.mark.slow
def test_runs_of_several_alphas_make_one_table(tmp_path):
    runs = []
    for alpha in (0.0, 0.1, 0.25, 0.5):
        runs.append(tmp_path / f"alpha{alpha}")
        judgments_folder(runs[-1] / "evaluate" / "judgments", runs[-1].name, GOOD)
        (runs[-1] / "train").mkdir()
        recipe = load_recipe("recipes/tiny.yaml", [f"objective.alpha={alpha}"])
        OmegaConf.save(recipe, runs[-1] / "train" / "recipe.yaml")
    found = compare(runs)
    lines = [line.split() for line in as_text(found).splitlines()[:5]]
    assert lines[0][:3] == ["arm", "loss_type", "alpha"]
    assert [line[:3] for line in lines[1:]] == [[run.name, "dpo", run.name[len("alpha") :]] for run in runs]
    assert len(found["differences"]) == 6


def test_the_command_prints_and_writes(tmp_path, two, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["treg", "compare", *map(str, two), "--output", str(out)])
    main.main()
    printed = capsys.readouterr().out
    assert "good \u2212 bad" in printed and (out / "report.html").exists()
    assert read_manifest(out / "comparison.json", FORMAT, VERSION)["arms"][1]["name"] == "bad"


def test_a_refusal_is_one_line_and_writes_nothing(tmp_path, two, monkeypatch, capsys):
    more = judgments_folder(tmp_path / "more", "more", [*GOOD, 0.5])
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["treg", "compare", str(two[0]), str(more), "--output", str(out)])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2 and not out.exists()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
