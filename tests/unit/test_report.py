"""The report of a comparison: tables, charts and Markdown of what is there, and data that cannot break out of them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.evaluated import HOSTILE, evaluation
from treg_megatron.evaluation.report import write_report
from treg_megatron.evaluation.reporting.charts import Curve, Point, Series, curves, distributions, nice_ticks, scatter
from treg_megatron.evaluation.reporting.figures import score_against_kl
from treg_megatron.evaluation.reporting.markdown import as_markdown
from treg_megatron.evaluation.reporting.material import Answered, Material, PromptAnswers, collect, training_metrics
from treg_megatron.evaluation.reporting.page import as_page, embedded
from treg_megatron.evaluation.reporting.tables import arm_table, difference_table


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A comparison of 20 prompts, and the two forms of its report as text."""
    folder = tmp_path_factory.mktemp("evaluation")
    comparison = evaluation(folder, 20)
    page, text = write_report(comparison, folder / "comparison")
    return comparison, page.read_text(encoding="utf-8"), text.read_text(encoding="utf-8")


def data_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_the_page_holds_every_answer_with_its_judgment(written):
    comparison, page, _ = written
    data = data_of(page)
    assert data["models"] == ["base", "alpha 0", "alpha 0.1", "alpha 0.25"]
    assert [prompt["id"] for prompt in data["prompts"]] == [f"prompt {number}" for number in range(20)]
    base, first, _, last = data["prompts"][6]["answers"]
    assert (base["preference"], first["preference"], last["preference"]) == (None, 0.25, 0.75)
    assert base["score"] == pytest.approx(6 / 10 - 0.5) and first["score"] == pytest.approx(2 * 0.25 - 0.7 + 0.6)
    assert first["characters"] == len(first["texts"][0]) and first["tokens"] == len(first["texts"][0].split())
    assert not data["prompts"][3]["answers"][1]["finished"] and first["finished"]
    assert page.count("<svg") == 7 and "__" not in re.sub(r"<script.*", "", page, flags=re.DOTALL)


def test_tables_leave_out_what_no_arm_has(written):
    table = arm_table(written[0])
    assert table.headings == [
        *("arm", "loss_type", "alpha", "win rate, %", "tokens", "characters", "cut off, %"),
        *("reward accuracy, %", "log-prob accuracy, %", "KL, nats a token"),
    ]
    assert table.rows[2][2:4] == ["0.25", "50.0 [47.5, 52.4]"] and table.rows[2][-1] == "0.0500 [0.0470, 0.0540]"
    assert difference_table(written[0]).rows == [
        ["alpha 0.25 \u2212 alpha 0", "\u22121.2 [\u22123.5, +1.0]", "300", "320", "185", "0.44"]
    ]


def test_the_markdown_says_the_same(written):
    comparison, _, text = written
    for heading in (
        "Arms",
        "Differences",
        "Score against KL",
        "Lengths, scores and preferences",
        "Training",
        "Answers",
    ):
        assert f"\n## {heading}\n" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert (
        "\n| arm | loss_type | alpha |" in text
        and "| alpha 0.25 | dpo | 0.25 | 50.0 [47.5, 52.4] | 270 | 1,140 |" in text
    )
    assert "[recipe](<../run-0.25/train/recipe.yaml>)" in text
    for before, line in zip(rows, rows[1:]):
        if set(line) <= set("|- "):
            assert before.count("|") == line.count("|")
    assert "| alpha 0 | validation/loss |" in text and "(step 20)" in text and "(step 100)" in text
    assert text.count("Prompt prompt") == 12  # the best two and the worst two of three arms


def test_hostile_texts_stay_data(tmp_path):
    comparison = evaluation(tmp_path, 10, hostile=True)
    comparison["arms"][0]["name"] = "<b>arm</b> | `code` __DATA__ \x1b[2J"
    comparison["arms"][1]["name"] = "[link](address) a_b _c_ [d]: e"
    page, text = (path.read_text(encoding="utf-8") for path in write_report(comparison, tmp_path / "comparison"))
    assert page.count("</script>") == 2 and "<b>arm" not in page and "<img" not in page.partition("<script")[0]
    assert data_of(page)["models"][1] == "<b>arm</b> | `code` __DATA__ \\x1b[2J"
    assert HOSTILE[0] in data_of(page)["prompts"][0]["turns"][0]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e\ud800-\udfff]", page + text)
    assert "\\<b\\>arm\\</b\\> \\| \\`code\\` \\_\\_DATA\\_\\_" in text
    assert "[link\\](address) a_b \\_c\\_ [d\\]: e" in text
    fence = ""  # outside of fenced blocks no text of the data stands unescaped
    for line in text.splitlines():
        if mark := re.match(r"(`{3,})(text)?$", line):
            fence = "" if mark[1] == fence else fence or mark[1]
        elif not fence:
            assert not re.search(r"(?<!\\)<(?!\.\./)", line), line
    assert fence == ""


@given(st.text(st.characters(codec=None), max_size=30))
def test_embedded_data_is_what_it_was(text):
    held = embedded({"text": text})
    assert json.loads(held) == {"text": text} and "<" not in held


def test_what_is_gone_is_left_out_with_a_warning(tmp_path, caplog):
    comparison = evaluation(tmp_path, 5)
    shutil.rmtree(tmp_path / "run-0.1")
    comparison["arms"][2] |= {"judgments": None, "run": None, "answers": None, "recipe": None, "checkpoint": None}
    page, text = (path.read_text(encoding="utf-8") for path in write_report(comparison, tmp_path / "comparison"))
    assert "the report lacks the answers of alpha 0.1" in caplog.text and "alpha 0.25" not in caplog.text
    assert [answer is None for answer in data_of(page)["prompts"][0]["answers"]] == [False, False, True, True]
    shutil.rmtree(tmp_path / "baseline")
    for arm in comparison["arms"]:
        arm |= {"judgments": None, "kl": None}
    page, text = (path.read_text(encoding="utf-8") for path in write_report(comparison, tmp_path / "comparison"))
    assert data_of(page)["prompts"] == [] and "| alpha 0.25 |" in text and "## Answers" not in text


def test_annotations_of_alpaca_eval_hold_their_own_answers(tmp_path):
    rows = [
        {"instruction": "Q?", "output_1": "base's", "output_2": "arm's", "preference": p, "dataset": "koala"}
        for p in (1.25, 0.0, None)
    ]
    for number, row in enumerate(rows):
        row["instruction"] += str(number)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows))
    arm = {"name": "arm", "judgments": str(path), "run": None}
    found = collect({"baseline": "base", "arms": [arm]})
    assert [prompt.answers[1].preference for prompt in found.prompts] == [0.25, 0.5, None]
    assert found.prompts[0].answers[0] == Answered(["base's"]) and found.prompts[0].category == "koala"


def test_all_turns_are_shown():
    turns = PromptAnswers("a", ["One?", "Two?"], None, [Answered(["1", "2"]), Answered(["one", "two"], preference=1.0)])
    arm = {"name": "arm", "judgments": None, "run": None, "recipe": None, "checkpoint": None, "answers": None}
    figures = dict.fromkeys(("objective", "length_controlled", "length_controlled_interval", "score", "score_interval"))
    figures |= dict.fromkeys(("mean_tokens", "mean_characters", "truncated_share", "accuracy", "kl"))
    arm |= figures | {"win_rate": 100.0, "win_rate_interval": None, "length_control": "none"}
    comparison = {"benchmark": "mt_bench", "judge": {"name": "j"}, "baseline": "base", "prompts": 1, "confidence": 0.95}
    comparison |= {"arms": [arm], "differences": []}
    material = Material(["base", "arm"], [turns], [[]])
    prompt = data_of(as_page(comparison, material, Path(".")))["prompts"][0]
    assert prompt["turns"] == ["One?", "Two?"] and prompt["answers"][1]["texts"] == ["one", "two"]
    text = as_markdown(comparison, material, Path("."))
    assert "One?\n\nTwo?" in text and "one\n\ntwo" in text and "## Differences" not in text


def test_metrics_of_a_killed_run_are_read_to_the_last_whole_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert training_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]
    assert training_metrics(tmp_path / "none") == []


def test_score_against_kl_takes_two_arms_and_the_length_controlled_rate_where_all_have_it(tmp_path):
    comparison = evaluation(tmp_path, 2)
    assert "win rate, %" in score_against_kl(comparison)
    assert ">\u03b1 0.25</text>" in score_against_kl(comparison)
    for arm in comparison["arms"]:
        arm |= {"length_controlled": 40.0, "length_controlled_interval": [38.0, 42.0]}
    assert "length-controlled win rate, %" in score_against_kl(comparison)
    comparison["arms"][0]["kl"] = comparison["arms"][1]["kl"] = None
    assert score_against_kl(comparison) is None


# -- charts ---------------------------------------------------------------------------------------------------------

numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))


@given(numbers, numbers)
def test_ticks_are_round_and_hold_the_range(one, other):
    low, high = sorted((one, other))
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(1, abs(low), abs(high))
    assert 2 <= len(ticks) <= 8 and ticks[0] <= low + slack and ticks[-1] >= high - slack
    steps = [b - a for a, b in zip(ticks, ticks[1:])]
    assert max(steps) - min(steps) <= 1e-6 * max(map(abs, ticks)) and float(f"{steps[0]:.0e}") == pytest.approx(
        steps[0]
    )


def points_of(svg: str, kind: str) -> list[tuple[float, float]]:
    found = re.search(rf'<polyline class="{kind}" points="([^"]*)"', svg)[1]
    return [tuple(map(float, point.split(","))) for point in found.split()]


def test_a_curve_goes_where_its_points_are():
    svg = curves("title", [Curve("a", 1, [(0, 0), (5, 10), (10, 5)])], "x", "y")
    (x0, y0), (x1, y1), (x2, y2) = points_of(svg, "series s1")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.2) and y1 < y0


def test_a_distribution_is_of_shares_and_one_far_value_does_not_squeeze_it():
    values = [float(number % 10) for number in range(1000)]
    svg = distributions("title", [Series("a", 0, values), Series("b", 1, [1.0] * 10)], "x")
    assert max(y for _, y in points_of(svg, "series s0")) > min(y for _, y in points_of(svg, "series s1"))
    far = distributions("title", [Series("a", 0, [*values, 1e9])], "x")
    assert "<text" in far and "e+0" not in far


def test_points_have_their_intervals():
    svg = scatter(
        "title", [Point("a", 1, 0.1, 50, [0.05, 0.2], [45, 60]), Point("b", 2, 0.2, 55, None, None)], "x", "y", 50
    )
    assert svg.count('class="series s1"') == 3 and svg.count('class="series s2"') == 1
    (x0, _), (x1, _) = points_of(svg, "level")
    assert x1 > x0
