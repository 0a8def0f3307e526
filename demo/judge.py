"""The demo's judge: a small rule that knows, for each held-out prompt, a better and a worse response.

An answer's score is its overlap in words with the better response less that with the worse one. The rule sees neither
grammar nor truth: it shows how answers are judged and compared, not how good they are.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

HELD_OUT = Path(__file__).with_name("pairs") / "heldout.jsonl"


def word_overlap(messages: Sequence[dict[str, str]], responses: Sequence[str]) -> list[float]:
    """A score in [-1, 1] for each response to a held-out prompt; higher is better."""
    better, worse = _known_responses()[messages[-1]["content"]]
    return [f1(words(response), better) - f1(words(response), worse) for response in responses]


def f1(answer: Counter[str], known: Counter[str]) -> float:
    """Harmonic mean of the shares of each side's words that the other has."""
    return 2 * (answer & known).total() / max(answer.total() + known.total(), 1)


def words(text: str) -> Counter[str]:
    """Words and numbers, without case."""
    return Counter(re.findall(r"\w+", text.lower()))


@cache
def _known_responses() -> dict[str, tuple[Counter[str], Counter[str]]]:
    pairs = map(json.loads, HELD_OUT.read_text(encoding="utf-8").splitlines())
    return {
        pair["prompt"][-1]["content"]: (words(pair["chosen"][-1]["content"]), words(pair["rejected"][-1]["content"]))
        for pair in pairs
    }
