"""Judging by alpaca_eval's annotators, with the package itself and a server that judges by a rule."""

import csv
import dataclasses
import json
import os
import random
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.support.judge_storm import storm
from tests.support.judging_server import alpaca_eval_file, completion, judging_server, probability, shown
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.errors import UserError
from treg_megatron.evaluation.judge import judge
from treg_megatron.evaluation.judges.elsewhere import commands
from treg_megatron.evaluation.judgment_folder import read_judgments

ARM, BASELINE = [3, 9, 5, 0, 1, 7, 2, 12], [5, 4, 5, 30, 1, 2, 2, 8]  # words of each answer
SAME = 4  # the prompt to which both give the same answer


@pytest.fixture
def server():
    with judging_server() as running:
        yield running


@pytest.fixture
def settings(server, tmp_path, alpaca_eval_python):
    arm, baseline = alpaca_eval_file("arm", ARM), alpaca_eval_file("base", BASELINE)
    baseline[SAME]["output"] = arm[SAME]["output"]
    for name, rows in (("arm", arm), ("base", baseline)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    overrides = {
        "arm": tmp_path / "arm.json",
        "baseline": tmp_path / "base.json",
        "output": tmp_path / "judged",
        "cache": tmp_path / "cache",
        "kind": "alpaca_eval",
        "alpaca_eval_python": alpaca_eval_python,
        "server": server.address,
        "model": "org/judge-instruct",
        "shard_prompts": 5,
        "concurrency": 4,
    }
    return section(load_recipe(overrides=[f"judge.{key}={value}" for key, value in overrides.items()]), "judge")


def rule(tmp_path):
    """The probability that the rule gives each of the arm's answers."""
    sides = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("arm", "base")]
    return [probability(arm["output"], baseline["output"]) for arm, baseline in zip(*sides, strict=True)]


def test_the_preference_is_that_of_alpaca_eval_itself(settings, server, tmp_path):
    judge(settings)
    rows = read_judgments(settings.output).rows
    assert [row["preference"] for row in rows] == pytest.approx(rule(tmp_path), abs=1e-12)
    for row in rows:
        assert sorted(order["arm_first"] for order in row["orders"]) == [False, True]
    assert rows[SAME]["preference"] == 0.5
    asked = list(server.asked)
    assert len(asked) == 2 * (len(rows) - 1) and {request["model"] for request in asked} == {"org/judge-instruct"}
    for row, arm in zip(rows, alpaca_eval_file("arm", ARM), strict=True):  # arm_first tells what was shown
        if row is not rows[SAME]:
            shown_first = [request for request in asked if shown(request)[0] == arm["output"]]
            assert len(shown_first) == 1

    # the command that is printed for elsewhere, in alpaca_eval's own environment
    command = commands(dataclasses.replace(settings, output=str(tmp_path / "elsewhere")))
    command, _, compare = command.partition("treg compare ")
    before = len(server.asked)
    subprocess.run(
        ["sh", "-ec", command.rstrip() + " --caching_path None"],  # the package keeps one inside itself
        env={
            **os.environ,
            "PATH": f"{Path(settings.alpaca_eval_python).parent}:{os.environ['PATH']}",
            "OPENAI_API_KEY": "x",
            "OPENAI_API_BASE": server.address,
        },
        check=True,
        capture_output=True,
    )
    assert {request["model"] for request in server.asked[before:]} == {"gpt-4-1106-preview"}
    theirs = json.loads(Path(compare.strip()).read_text())
    ours = json.loads((Path(settings.output) / "annotations.json").read_text())
    own_order = [row["orders"][0]["preference"] for row in rows]
    assert [entry["preference"] - 1 for entry in theirs] == pytest.approx(own_order, abs=1e-9)
    varying = ("preference_date", "preference_time_per_example", "preference_price_per_example")
    for one, two in zip(ours, theirs, strict=True):
        assert one.keys() == two.keys()
        same = [key for key in one if key not in (*varying, "preference", "preference_raw_completion")]
        assert {key: one[key] for key in same} == {key: two[key] for key in same}
    # the two orders show each pair differently, and alpaca_eval's own order is the first of ours
    for request in server.asked[before:]:
        first, second = shown(request)
        (row,) = [r for r in rows if {first, second} == {r["orders"][0]["annotation"][f"output_{i}"] for i in (1, 2)}]
        assert row["orders"][0]["arm_first"] == first.startswith("arm")
    with open(Path(compare.strip()).with_name("leaderboard.csv"), newline="") as file:
        (line,) = csv.DictReader(file)
    assert float(line["win_rate"]) == pytest.approx(100 * sum(own_order) / len(own_order), abs=1e-9)


def test_one_order_costs_half(settings, server, tmp_path):
    judge(dataclasses.replace(settings, orders="one"))
    assert len(server.asked) == len(ARM) - 1
    rows = read_judgments(settings.output).rows
    assert [row["preference"] for row in rows] == pytest.approx(rule(tmp_path), abs=1e-12)
    assert len({row["orders"][0]["arm_first"] for row in rows}) == 2  # the prompt decides


def test_an_annotator_that_calls_a_function(settings, server, tmp_path):
    judge(dataclasses.replace(settings, annotator="alpaca_eval_gpt4_turbo_fn"))
    rows = read_judgments(settings.output).rows
    expected = [0.5 if number == SAME else float(p > 0.5) for number, p in enumerate(rule(tmp_path))]
    assert [row["preference"] for row in rows] == expected and all(body["tools"] for body in server.asked)


def test_replies_that_cannot_be_read_are_asked_for_again_and_then_count_as_failed(settings, server):
    seen: Counter[str] = Counter()

    def hesitant(request):
        first, second = shown(request)
        arm = min(first, second)  # "arm..." < "base..."
        if arm.startswith("arm1 "):
            return 400, {"error": {"message": "against our rules"}}
        seen[first] += 1
        reply = completion(request)
        if arm.startswith("arm0 ") or (arm.startswith("arm2 ") and seen[first] < 3):
            reply["choices"][0]["logprobs"] = None
        return 200, reply

    server.answer = hesitant
    manifest = judge(settings)
    assert (manifest["judged"], manifest["failed"]) == (len(ARM) - 2, 2)
    rows = read_judgments(settings.output).rows
    assert [number for number, row in enumerate(rows) if row["preference"] is None] == [0, 1]
    assert "against our rules" in rows[1]["orders"][0]["reply"]
    assert sum(count for first, count in seen.items() if "0 " in first) == 2 * 3
    before = len(server.asked)
    judge(dataclasses.replace(settings, output=settings.output + "-again"))
    # what was refused has cost nothing and is asked for again; the replies without log-probs are not
    assert {min(shown(request)).split()[0] for request in server.asked[before:]} == {"arm1"}


def test_a_server_without_log_probs_is_found_out_early(settings, server):
    def plain(request):
        reply = completion(request)
        del reply["choices"][0]["logprobs"]
        return 200, reply

    server.answer = plain
    with pytest.raises(UserError, match="gave no verdict on any of the first 3 prompts"):
        judge(dataclasses.replace(settings, shard_prompts=3))
    assert not list(Path(settings.output).glob("judgments-*"))


@pytest.mark.parametrize(
    "annotator, message",
    [
        ("no_such", "has no annotator no_such; it has .*weighted_alpaca_eval_gpt4_turbo"),
        ("claude", "annotator claude asks by anthropic_completions, not a chat server"),
    ],
)
def test_annotators_that_cannot_be_used(settings, server, annotator, message):
    with pytest.raises(UserError, match=message):
        judge(dataclasses.replace(settings, annotator=annotator))
    assert server.asked == []


def test_a_server_that_is_down_is_the_message(settings, monkeypatch):
    monkeypatch.setattr("treg_megatron.utils.http.FIRST_PAUSE", 0.001)
    with pytest.raises(UserError, match="127.0.0.1:9/v1/chat/completions gave no answer in 2 attempts"):
        judge(dataclasses.replace(settings, server="http://127.0.0.1:9/v1", max_attempts=2))


def test_kills_cost_nothing_twice(tmp_path, alpaca_eval_python):
    options = {"kind": "alpaca_eval", "alpaca_eval_python": alpaca_eval_python}
    counts = storm(tmp_path, kills=2, prompts=60, seed=random.randrange(1000), options=options)
    assert (counts["paid_twice"], counts["lost"]) == (0, 0) and counts["kills"] > 0
