"""The report of a comparison in a real browser without network access: 805 pairs of answers, by keyboard and mouse."""

import json
import re
from pathlib import Path

import pytest

from tests.support.evaluated import evaluation
from treg_megatron.evaluation.report import write_report

PROMPTS = 805  # AlpacaEval's
#: text of a side without what is marked in it
UNMARKED = """(() => {
  const copy = document.querySelector("#pair .sides > div:nth-child(SIDE) .text").cloneNode(true);
  copy.querySelectorAll("ins, del").forEach(marked => marked.remove());
  return copy.textContent;
})()"""


def page_of(folder: Path, prompts: int, **options) -> str:
    page, _ = write_report(evaluation(folder, prompts, **options), folder / "comparison")
    return f"file://{page}"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return page_of(tmp_path_factory.mktemp("evaluation"), PROMPTS, words=250)


def text(window, selector: str) -> str:
    return window.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")


def texts(window, selector: str) -> list[str]:
    return window.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.textContent)")


def prompt_shown(window) -> str:
    return re.search(r"prompt (prompt \d+)", text(window, "#pair .head"))[1]


def test_805_pairs_open_within_two_seconds_of_processor_time(window, page):
    """Of the page's main thread: parsing, layout and scripts, whatever else the machine does."""
    driver = window._driver
    driver.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    window.open(page)
    metrics = {m["name"]: m["value"] for m in driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    driver.execute_cdp_cmd("Performance.disable", {})
    assert text(window, "#count") == "805 of 805 prompts"
    assert prompt_shown(window) == "prompt 0" and text(window, "#pair .sides").startswith("base")
    assert 0 < metrics["TaskDuration"] < 2
    assert len(texts(window, ".row")) < 60 and len(texts(window, ".sides")) == 1  # only what is in view is drawn


def test_the_keyboard_moves_chooses_and_searches(window, page):
    window.open(page)
    seen = []
    for key in ("j", "j", "k", "j"):
        window.press(key)
        seen.append(prompt_shown(window))
    assert seen == ["prompt 1", "prompt 2", "prompt 1", "prompt 2"]
    assert text(window, "#pair .sides div + div h3") == "alpha 0"
    window.press("3")
    assert text(window, "#pair .sides div + div h3") == "alpha 0.25" and prompt_shown(window) == "prompt 2"
    marks = len(texts(window, "#pair ins, #pair del"))
    window.press("d")
    assert marks > 5 and not texts(window, "#pair ins, #pair del")
    window.press("/", *"QUESTION 77:")
    assert text(window, "#count") == "1 of 805 prompts" and prompt_shown(window) == "prompt 77"
    window.press("j")  # is typed into the search
    assert window.evaluate("document.getElementById('text').value") == "QUESTION 77:j"
    assert text(window, "#pair") == "No prompt passes the filters."
    assert window.evaluate("location.hash") == "#arm=3&text=QUESTION+77%3Aj&changes=off"


def test_arrows_and_end_keys_walk_the_list_and_it_scrolls(window, page):
    window.open(page)
    window.evaluate("document.getElementById('list').focus()")
    window.press("down", "down", "up")
    assert prompt_shown(window) == "prompt 1"
    assert window.evaluate("document.getElementById('list').getAttribute('aria-activedescendant')") == "row-1"
    window.evaluate(
        "document.getElementById('list').dispatchEvent(new KeyboardEvent('keydown', {key: 'End', bubbles: true}))"
    )
    assert prompt_shown(window) == "prompt 804" and "Question 804" in texts(window, ".row[aria-selected=true]")[0]
    assert window.evaluate("document.getElementById('list').scrollTop") > 30_000


def test_the_mouse_filters_sorts_and_chooses(window, page):
    window.open(page)
    window.click("#outcome option[value=won]")
    assert text(window, "#count") == "322 of 805 prompts"  # 3 and 4 of every 5
    assert prompt_shown(window) == "prompt 3"
    window.click("#category option[value=odd]")
    assert text(window, "#count") == "161 of 805 prompts"
    window.click(".row:nth-child(2)")
    assert prompt_shown(window) == "prompt 9"
    window.click("#next")
    assert prompt_shown(window) == "prompt 13"
    window.click(".chips button:nth-child(3)")  # alpha 0.25, where the preferences are turned round
    assert text(window, "#count") == "161 of 805 prompts" and prompt_shown(window) == "prompt 1"
    window.click("#outcome option[value=cut]")
    assert text(window, "#count") == "21 of 805 prompts"
    window.click("#changes")
    assert not texts(window, "#pair ins, #pair del")


@pytest.mark.parametrize("sort, sign", [("longer", -1), ("shorter", 1)])
def test_length_changes_are_in_order(window, page, sort, sign):
    window.open(f"{page}#arm=3&sort={sort}")
    lines = texts(window, ".row .about")
    changes = [
        int(re.search(r"([+\u2212])([\d,]+) char", line).expand(r"\1\2").replace("\u2212", "-").replace(",", ""))
        for line in lines
    ]
    assert changes == sorted(changes, key=lambda change: sign * change) and len(set(changes)) > 3


def test_preferences_are_in_order_and_a_link_shows_what_its_sender_saw(window, page):
    window.open(f"{page}#arm=2&sort=best&prompt=prompt+17")
    assert prompt_shown(window) == "prompt 17" and text(window, "#pair .sides div + div h3") == "alpha 0.1"
    window.press("j")
    assert prompt_shown(window) == "prompt 22" and "prompt=prompt+22" in window.evaluate("location.hash")


def test_two_arms_stand_side_by_side(window, page):
    window.open(page)
    window.evaluate("dispatchEvent(new MouseEvent('mousedown'))")  # which the driver leaves out when it opens a list
    window.click("#against option[value='1']")
    window.press("3")  # the list has given the keys back
    assert texts(window, "#pair .sides h3") == ["alpha 0", "alpha 0.25"]
    lengths = [
        int(re.search(r"([\d,]+) char", line)[1].replace(",", "")) for line in texts(window, "#pair .sides .about")
    ]
    change = re.search(r"([+\u2212]\d+) char", texts(window, ".row[aria-selected=true] .about")[0])[1]
    assert int(change.replace("\u2212", "-")) == lengths[1] - lengths[0] != 0
    assert "against=1" in window.evaluate("location.hash")


def test_marked_words_are_those_that_changed(window, tmp_path):
    """Marks off, both texts are whole; marks on, without them the sides are equal."""
    window.open(page_of(tmp_path, 12))
    for _ in range(12):
        sides = [texts(window, f"#pair .sides > div:nth-child({side}) .text")[0] for side in (1, 2)]
        unmarked = [window.evaluate(UNMARKED.replace("SIDE", str(side))).split() for side in (1, 2)]
        assert unmarked[0] == unmarked[1] and sides[0] != sides[1]
        assert 0.3 < len(unmarked[0]) / len(sides[0].split()) < 1
        window.press("j")


@pytest.mark.parametrize(
    "base, arm, only_base, only_arm",
    [
        ("One two three four.", "One two three four.", "", ""),
        ("a b c d e f", "a b c X d e f", "", "X"),
        ("a b c d e f", "d e f", "a b c", ""),
        ("a b c d e f g h i", "a b c X d Y e f g h i", "d", "X d Y"),  # one common word between changes is chance
        ("\u6cb3\u6c34\u5f88\u6e05\u6f88", "\u6cb3\u6c34\u5f88\u6d51\u6d4a", "\u6e05 \u6f88", "\u6d51 \u6d4a"),
        ("line\n" * 5000, "line\n" * 4999 + "end", "line", "end"),  # longer than what is compared by words
    ],
)
def test_words_of_one_side_alone(window, page, base, arm, only_base, only_arm):
    window.open(page)
    alone = "parts(%s, %s).map(([pieces, kept]) => pieces.filter((_, k) => !kept[k]).map(p => p.trim()).join(' '))"
    assert window.evaluate(alone % (json.dumps(base), json.dumps(arm))) == [only_base, only_arm]


def test_answers_that_share_nothing_are_not_marked(window, page):
    window.open(page)
    assert window.evaluate("parts('one two three four nine five', 'six seven eight five')") is None
    window.evaluate("(data.prompts[0].answers[1].texts[0] = 'Nothing like it.', drawPair())")
    assert "share hardly a passage" in text(window, "#pair") and not texts(window, "#pair ins, #pair del")


def test_hostile_texts_are_only_shown(window, tmp_path):
    window.open(page_of(tmp_path, 10, hostile=True))
    for number in range(10):
        shown = text(window, "#pair")
        assert window.evaluate("document.title") == "Evaluation on alpaca_eval"
        if number % 5 == 0:
            assert "</script><script>document.title = 'broken'</script>" in shown
        if number % 5 == 1:
            assert "<!-- <script> ${1 + 1} __DATA__ $title \\u003c" in shown
        if number % 5 == 3:
            assert "null \\x00 bell \\x07 escape \\x1b[2J turned \\x202eevil" in shown
        assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", shown) and "half \\ud800" in shown
        window.press("j")


def test_the_page_asks_nobody_for_anything(window, page):
    window.open(page)
    assert window.evaluate("performance.getEntriesByType('resource').length") == 0
    content = Path(page.removeprefix("file://")).read_text(encoding="utf-8")
    assert not re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", content)
    assert not re.search(r"<(link|img|iframe|script src)|url\(|@import", content)


def test_tables_charts_and_links_are_there(window, page):
    window.open(page)
    assert len(texts(window, "#charts svg")) == 7
    assert texts(window, "#differences tbody td")[1:4] == ["300", "320", "185"]
    links = window.evaluate("[...document.querySelectorAll('tbody a')].map(a => a.href)")
    root = page.rpartition("/comparison/")[0]
    assert len(links) == 12 and links[0] == f"{root}/run-0/train/recipe.yaml"
    assert window.screenshot().startswith(b"\x89PNG")
    width = window.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width[0] <= width[1]
