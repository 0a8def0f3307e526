"""The page of ``inspect --html`` in a real browser without network access: what is seen, at two widths."""

import json

import pytest

from treg_megatron.data.inspection import inspect_pairs
from treg_megatron.data.inspection_page import write_page

EVIL = "<img src=x onerror='document.title=1'> " + "x" * 4000


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("page")
    rows = [
        {"prompt": f"q{i} {EVIL}", "chosen": ("Да. ", "Yes. ")[i % 4 > 0] * (i + 1), "rejected": "No.", "id": i}
        for i in range(40)
    ]
    scored = [{**row, "chosen_score": 5, "rejected_score": i % 5} for i, row in enumerate(rows)]
    bad = [{"prompt": "q", "chosen": "", "rejected": "x"}] * 8
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in scored + bad))
    report = inspect_pairs(folder / "pairs.jsonl", examples=2)
    write_page(folder / "page.html", "my & pairs.jsonl", report)
    return f"file://{folder / 'page.html'}"


def texts(window, selector: str) -> list[str]:
    return window.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(e => e.innerText)")


def test_the_page_shows_counts_lengths_and_writing_systems(window, page):
    window.open(page)
    assert texts(window, "h1 + p") == ["my & pairs.jsonl"] and "my & pairs.jsonl" in window.evaluate("document.title")
    (unusable,) = texts(window, "#unusable")
    assert unusable.startswith("cannot be used: 8 rows") and "row 41: chosen is an empty response" in unusable
    assert unusable.endswith("and 3 more")
    rows = [row.split("\t") for row in texts(window, "#lengths tr")]
    assert rows[0] == ["characters", "minimum", "median", "95th percentile", "maximum"]
    assert rows[3] == ["rejected", "3", "3", "3", "3"] and rows[4][0] == "prompt and longer answer"
    assert [row.split()[:2] for row in texts(window, "#scripts tr")] == [["latin", "30"], ["cyrillic", "10"]]
    widths = window.evaluate("[...document.querySelectorAll('.bar')].map(e => e.getBoundingClientRect().width)")
    assert widths == [300, 100]


def test_each_histogram_lies_in_its_frame_and_counts_every_pair(window, page):
    window.open(page)
    drawn = window.evaluate(
        "[...document.querySelectorAll('figure svg')].map(svg => ({frame: svg.getBoundingClientRect(),"
        " bars: [...svg.querySelectorAll('rect')].map(bar => [bar.getBoundingClientRect(), bar.textContent])}))"
    )
    assert len(drawn) == 5
    for histogram in drawn:
        frame = histogram["frame"]
        assert sum(int(said.split()[0]) for _, said in histogram["bars"]) == 40
        for bar, _ in histogram["bars"]:
            assert frame["left"] - 1 <= bar["left"] and bar["right"] <= frame["right"] + 1 and bar["height"] > 0
            assert frame["top"] - 1 <= bar["top"] and bar["bottom"] <= frame["bottom"]
    bars, line = (
        window.evaluate(
            f"[...[...document.querySelectorAll('svg')].at(-1).querySelectorAll('{what}')]"
            ".map(e => {const r = e.getBoundingClientRect(); return [r.left, r.right]})"
        )
        for what in ("rect", ".median")
    )
    assert len(bars) == 5 and bars[2][0] < line[0][0] < bars[2][1]  # margins from 1 to 5, of which 3 is the median


@pytest.mark.parametrize("width", [1200, 420])
def test_nothing_is_wider_than_the_window_and_nothing_runs(window, page, width):
    window.open(page)
    window.evaluate(f"document.body.style.width = '{width - 60}px'")
    assert window.evaluate("document.title") != "1" and window.evaluate("document.images.length") == 0
    wide = window.evaluate("[...document.querySelectorAll('pre')].some(e => e.scrollWidth > e.clientWidth)")
    right = window.evaluate(
        "Math.max(...[...document.querySelectorAll('pre')].map(e => e.getBoundingClientRect().right))"
    )
    assert not wide and right <= window.evaluate("document.body.getBoundingClientRect().right")
    assert window.evaluate("Math.max(...[...document.querySelectorAll('pre')].map(e => e.clientHeight))") < 420
    assert len(window.screenshot()) > 10_000
