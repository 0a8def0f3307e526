"""The token reward page in a real browser without network access: values, colours, sorting and filtering."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from tests.support.tiny import tiny_tokenizer
from treg_megatron.cli import show
from treg_megatron.data.labelled_pairs import SIDES, LabelledPair, write_shard
from treg_megatron.labelling.quality.measure import compare_sources, measure
from treg_megatron.labelling.rewards_page import text_report, token_texts, write_page

MINUS = "\u2212"
TOKENS = ["<pad>", "The", " sky", " is", " blue", " red", ".", " Why", "</script>", "\u00e4"]


def decode(ids) -> str:
    return "".join(TOKENS[i] for i in ids)


def labelled(pair_id: str, chosen: list[float], rejected: list[float]) -> LabelledPair:
    columns = {}
    for side, rewards in (("chosen", chosen), ("rejected", rejected)):
        response = [1, 2, 3, 4 if side == "chosen" else 5, 8, 6][-len(rewards) :]
        columns[f"{side}_tokens"] = np.array([7, *response], np.int32)
        columns[f"{side}_token_rewards"] = np.array(rewards, np.float32)
        columns[f"{side}_ref_logprobs"] = -np.arange(1, len(rewards) + 1, dtype=np.float32)
    return LabelledPair(pair_id, **columns, prompt=f"User: question {pair_id}?")


PAIRS = [
    labelled("plain", [0.1, -0.2, 0.3], [-0.4, 0.0, 0.05]),
    labelled("long", [0.4] * 6, [0.2, -0.5, 0.5, 0, 0, 0]),
    labelled("flat", [0.01, 0.01], [-0.01, -0.02]),
]


def test_label_statistics_by_hand():
    figures = measure(PAIRS[:1])
    quality = figures.main
    assert quality.mean_abs == pytest.approx(1.05 / 6) and quality.near_zero == pytest.approx(1 / 6)
    assert quality.chosen_mean == pytest.approx(0.2 / 3) and quality.rejected_mean == pytest.approx(-0.35 / 3)
    rewards = [0.1, -0.2, 0.3, -0.4, 0.0, 0.05]
    assert quality.surprisal.pearson == pytest.approx(np.corrcoef(rewards, [1, 2, 3] * 2)[0, 1])
    assert figures.warnings == []


def test_rewards_near_zero_or_contrary_give_a_warning():
    (warning,) = measure(PAIRS[2:]).warnings
    assert "near 0 (mean size 0.0125)" in warning
    (warning,) = measure([labelled("contrary", [-0.3] * 3, [0.3] * 3)]).warnings
    assert "lower mean reward (-0.3000)" in warning


def test_a_character_of_several_tokens_appears_at_the_last_one():
    raw = "a\u00e4\U0001f680b".encode()

    def decode_bytes(ids):
        return bytes(ids).decode(errors="replace")

    texts = token_texts(list(raw), decode_bytes)
    assert "".join(texts) == "a\u00e4\U0001f680b" and texts[:3] == ["a", "", "\u00e4"]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "rewards.html"
    write_page(path, "made for a test", measure(PAIRS), PAIRS, decode)
    return f"file://{path}"


def token(pair: int, side: int, number: int, column: int = 0) -> str:
    """CSS selector of a token; ``side`` 0 is chosen, ``column`` is the index of the row of tokens on that side."""
    return (
        f"#pair-{pair} .sides > div:nth-child({side + 1}) .tokens:nth-of-type({column + 1}) "
        f"span:nth-child({number + 1})"
    )


def told(window) -> str:
    return window.evaluate("document.getElementById('value').textContent")


def background(window, selector: str) -> tuple[str, float]:
    """Colour and opacity, as computed by the browser."""
    colour = window.evaluate(f"getComputedStyle(document.querySelector({json.dumps(selector)})).backgroundColor")
    *rgb, opacity = re.findall(r"[0-9.]+", colour)
    return ",".join(rgb), float(opacity)


def shown(window) -> list[int]:
    return window.evaluate("[...document.querySelectorAll('article')].map(a => Number(a.id.slice(5)))")


def test_a_hovered_token_shows_its_value_and_has_its_colour(window, page):
    window.open(page)
    tokens = [token(0, 0, number) for number in range(3)]
    texts = [window.evaluate(f"document.querySelector({json.dumps(one)}).textContent") for one in tokens]
    assert texts == [" blue", "</script>", "."] and told(window) == ""
    for one, reward, colour in zip(tokens, (0.1, -0.2, 0.3), ("33,102,172", "230,97,1", "33,102,172")):
        window.point_at(one)
        assert f"reward {'+' if reward > 0 else MINUS}{abs(reward):.4f}" in told(window)
        assert background(window, one) == (colour, pytest.approx(0.75 * (abs(reward) / 0.5) ** 0.5, abs=5e-3))
    assert 'chosen token 3 "."' in told(window) and "surprisal 3.00" in told(window)
    assert background(window, token(0, 1, 1))[1] == 0  # a reward of 0
    window.point_at(token(1, 1, 1))
    assert f'rejected token 2 " sky" \u00b7 reward {MINUS}0.5000' in told(window)


def test_arrow_keys_move_over_tokens_and_responses(window, page):
    window.open(page)
    window.evaluate(f"document.querySelector({json.dumps(token(0, 0, 0))}).focus()")
    walked = []
    for key in ("right", "right", "right", "left", "down", "down", "up", "up", "up", "left"):
        window.press(key)
        walked.append(re.match(r"(\w+ token \d)", told(window))[1])
    assert walked == [
        "chosen token 2",
        "chosen token 3",
        "rejected token 1",
        "chosen token 3",
        "rejected token 1",
        "chosen token 1",
        "rejected token 1",
        "chosen token 1",
        "chosen token 1",
        "chosen token 1",
    ]
    window.press("tab")
    assert told(window).startswith("rejected token 1")  # one tab stop per response, not per token


def test_views_sort_and_filter(window, page):
    views = {
        "": [0, 1, 2],
        "#sort=length": [1, 0, 2],
        "#sort=mean": [0, 2, 1],
        "#sort=gap": [2, 0, 1],
        "#spread=0.1": [0, 1],
        "#mean=0.1": [1],
        "#length=6": [0, 2],
        "#text=Question+FLAT": [2],
    }
    for view, expected in views.items():
        window.open(page + view)
        assert shown(window) == expected, view
    window.open(page)
    window.click("#text")
    window.press(*"question long")
    assert shown(window) == [1]
    assert window.evaluate("document.getElementById('count').textContent") == "1 of 3 pairs"
    assert window.evaluate("location.hash") == "#text=question+long"


def test_the_policy_is_shown_next_to_the_labels(window, tmp_path):
    implicit = [{side: -getattr(pair, f"{side}_token_rewards") for side in SIDES} for pair in PAIRS]
    write_page(tmp_path / "both.html", "made for a test", measure(PAIRS), PAIRS, decode, implicit)
    window.open(f"file://{tmp_path}/both.html")
    assert background(window, token(0, 0, 0, 0))[0] == "33,102,172"
    assert background(window, token(0, 0, 0, 1))[0] == "230,97,1"
    window.point_at(token(0, 0, 0, 1))
    assert f"reward +0.1000 \u00b7 policy's implicit reward {MINUS}0.1000" in told(window)
    summary = window.evaluate("document.getElementById('summary').textContent")
    assert summary.endswith("correlation with the labels-1.00")


def test_the_curves_of_every_source_fit_on_a_phone(window, tmp_path):
    turned = [
        dataclasses.replace(
            pair,
            chosen_token_rewards=-pair.chosen_token_rewards,
            rejected_token_rewards=-pair.rejected_token_rewards,
        )
        for pair in PAIRS
    ]
    figures = compare_sources({"contrastive prompts": PAIRS, "<b>log-ratio</b>": turned})
    write_page(tmp_path / "several.html", "made for a test", figures, PAIRS, decode)
    window.open(f"file://{tmp_path}/several.html")
    assert window.evaluate("[...document.querySelectorAll('#charts figcaption')].map(f => f.textContent)") == [
        "where the rewards' total size lies",
        "factors of the gradient, contrastive prompts",
        "factors of the gradient, <b>log-ratio</b>",
        "along the response",
        "by surprisal",
    ]
    assert window.evaluate("document.querySelectorAll('#charts polyline').length") == 2 + 5 + 5 + 2 + 2
    assert "NaN" not in window.evaluate("document.getElementById('charts').innerHTML")
    rows = window.evaluate(
        "[...document.querySelectorAll('#summary tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    assert ["", "contrastive prompts", "<b>log-ratio</b>"] in rows
    assert ["correlation of contrastive prompts with <b>log-ratio</b>", "-1.00, -1.00"] in rows
    window.resize(340, 844)
    assert window.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    window.resize(1200, 900)


def test_a_screenshot_works_and_the_page_loads_nothing_else(window, page):
    window.open(page)
    picture = window.screenshot()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    addresses = set(re.findall(r"https?://[^\s\"']+", Path(page.removeprefix("file://")).read_text(encoding="utf-8")))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of SVG's elements, which is not fetched


def test_the_terminal_shows_values_or_shades():
    implicit = [{side: -getattr(pair, f"{side}_token_rewards") for side in SIDES} for pair in PAIRS[:1]]
    plain = "\n".join(text_report(measure(PAIRS), PAIRS[:1], decode, False, implicit))
    assert "mean size of a reward" in plain and "User: question plain?" in plain
    assert "-- chosen, mean +0.0667\n blue[+0.10]</script>[-0.20].[+0.30]" in plain
    assert "-- chosen, the policy's implicit rewards, mean -0.0667\n blue[-0.10]</script>[+0.20].[-0.30]" in plain
    shaded = list(text_report(measure(PAIRS), PAIRS[:1], decode, True))
    assert "\x1b[30;48;2;" in shaded[-1] and "[+" not in shaded[-1]


def test_the_terminal_gets_no_control_bytes_of_the_data():
    evil = [dataclasses.replace(PAIRS[0], prompt="User: \x1b[2J\u202e", pair_id="a\x07")]
    text = "\n".join(text_report(measure(PAIRS), evil, lambda ids: "\x1b]0;" * len(ids), False))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", text)
    assert "User: \\x1b[2J\\x202e" in text and "== a\\x07" in text and "\\x1b]0;[" in text


def test_the_command_prints_the_figures_as_json(tmp_path, capsys):
    tiny_tokenizer(tmp_path)
    write_shard(tmp_path / "labelled.parquet", PAIRS)
    arguments = ["--labelled", f"{tmp_path}/labelled.parquet", "--tokenizer", str(tmp_path), "--json", "--pairs", "1"]
    show.run(show.parser().parse_args(arguments))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(measure(PAIRS).as_json()))
