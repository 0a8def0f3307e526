"""The page of token rewards in a real browser, without a network: values, colours, sorting and filtering."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from treg_megatron.labels import LabelledPair
from treg_megatron.rewards_page import quality, token_texts, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WORDS = ["<pad>", "The", " sky", " is", " blue", " red", ".", " Why", "</script>", "\u00e4"]


def decode(ids) -> str:
    return "".join(WORDS[i] for i in ids)


def labelled(pair_id: str, chosen: list[float], rejected: list[float]) -> LabelledPair:
    columns = {}
    for side, rewards in (("chosen", chosen), ("rejected", rejected)):
        response = [1, 2, 3, 4 if side == "chosen" else 5, 8, 6][-len(rewards):]
        columns[f"{side}_tokens"] = np.array([7, *response], np.int32)
        columns[f"{side}_token_rewards"] = np.array(rewards, np.float32)
        columns[f"{side}_ref_logprobs"] = -np.arange(1, len(rewards) + 1, dtype=np.float32)
    return LabelledPair(pair_id, **columns, prompt=f"User: question {pair_id}?")


PAIRS = [labelled("plain", [0.1, -0.2, 0.3], [-0.4, 0.0, 0.05]), labelled("long", [0.4] * 6, [0.2, -0.5, 0.5, 0, 0, 0]),
         labelled("flat", [0.01, 0.01], [-0.01, -0.02])]


def test_figures_of_the_labels_by_hand():
    figures = quality(PAIRS[:1])
    assert figures.mean_abs == pytest.approx(1.05 / 6) and figures.near_zero == pytest.approx(1 / 6)
    assert figures.chosen_mean == pytest.approx(0.2 / 3) and figures.rejected_mean == pytest.approx(-0.35 / 3)
    rewards = [0.1, -0.2, 0.3, -0.4, 0.0, 0.05]
    assert figures.with_surprisal == pytest.approx(np.corrcoef(rewards, [1, 2, 3] * 2)[0, 1])
    assert figures.warnings == []


def test_mere_copying_and_contrary_rewards_are_warned_of():
    (warning,) = quality(PAIRS[2:]).warnings
    assert "near 0 (mean size 0.0125)" in warning
    (warning,) = quality([labelled("contrary", [-0.3] * 3, [0.3] * 3)]).warnings
    assert "lower mean reward (-0.3000)" in warning


def test_a_character_of_several_tokens_appears_with_its_last():
    raw = "a\u00e4\U0001f680b".encode()

    def decode_bytes(ids):
        return bytes(ids).decode(errors="replace")

    texts = token_texts(list(raw), decode_bytes)
    assert "".join(texts) == "a\u00e4\U0001f680b" and texts[:3] == ["a", "", "\u00e4"]


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")


def browse(*arguments: str) -> str:
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "rewards.html"
    write_page(path, "made for a test", quality(PAIRS), PAIRS, decode)
    return path


def articles(page: Path, view: str = "") -> list[str]:
    document = browse("--dump-dom", f"file://{page}{view}")
    return re.findall(r'<article id="pair-(\d+)">', document.partition('<main id="pairs">')[2])


@needs_chromium
def test_a_token_shows_its_value_and_colour(page):
    document = browse("--dump-dom", f"file://{page}").partition('<main id="pairs">')[2]
    spans = re.findall(r'<span title="([^"]*)" data-value="([^"]*)" tabindex="(-?\d)" '
                       r'style="background-color: ([^;]*);">([^<]*)</span>', document)
    assert len(spans) == sum(len(rewards) for pair in PAIRS
                             for rewards in (pair.chosen_token_rewards, pair.rejected_token_rewards))
    title, value, tabindex, colour, text = spans[0]
    assert (value, tabindex, text) == ("0.1", "0", " blue") and "reward +0.1000" in title
    assert "surprisal 1.00" in title and colour.startswith("rgba(33, 102, 172")
    assert "reward \u22120.2000" in spans[1][0] and spans[1][3].startswith("rgba(230, 97, 1")
    assert spans[1][4] == "&lt;/script&gt;"
    strength = [float(re.search(r"([0-9.]+)\)$", span[3])[1]) for span in spans[:3]]
    assert strength[0] < strength[1] < strength[2]


@needs_chromium
def test_views_sort_and_filter(page):
    assert articles(page) == ["0", "1", "2"]
    assert articles(page, "#sort=length") == ["1", "0", "2"]
    assert articles(page, "#sort=mean") == ["0", "2", "1"]
    assert articles(page, "#spread=0.1") == ["0", "1"]
    assert articles(page, "#mean=0.1") == ["1"]
    assert articles(page, "#length=6") == ["0", "2"]
    assert articles(page, "#text=Question+FLAT") == ["2"]


@needs_chromium
def test_it_can_be_photographed_and_names_no_other_address(page, tmp_path):
    browse(f"--screenshot={tmp_path}/page.png", "--window-size=1200,900", f"file://{page}")
    picture = (tmp_path / "page.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    addresses = set(re.findall(r"https?://[^\s\"']+", page.read_text(encoding="utf-8")))
    assert addresses == {"http://www.w3.org/2000/svg"}          # the name of SVG's elements, which is not fetched
