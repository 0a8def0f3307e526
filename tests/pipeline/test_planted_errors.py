"""Token rewards of a real model detect planted errors: short answers, each with one span that is clearly wrong.

tests/data/planted_errors.jsonl marks the errors by character; offsets map the marks to tokens. The tests measure how
well a score separates the first token of each error from the tokens outside errors (AUROC: the probability that it
ranks a random token of the first kind above one of the second).
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from treg_megatron.labelling.contrastive import contrastive_rewards
from treg_megatron.labelling.prompt_pair import load_prompt_pair
from treg_megatron.labelling.scoring import ScoredSequence
from treg_megatron.tokenizer.conversation import Message

ROOT = Path(__file__).resolve().parents[2]
ITEMS = [json.loads(line) for line in (ROOT / "tests" / "data" / "planted_errors.jsonl").read_text().splitlines()]


class Scored(NamedTuple):
    """Values of an answer's tokens, without the end-of-turn token."""

    first_error: int
    good: np.ndarray  # [tokens] bool, outside of every error
    reference: np.ndarray
    few_shot: np.ndarray
    oracle: np.ndarray


@pytest.fixture(scope="module")
def suite(smollm2) -> list[Scored]:
    from transformers import AutoTokenizer

    from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer
    from treg_megatron.tokenizer.chat import load_tokenizer

    tokenizer, offsets_of = load_tokenizer(smollm2), AutoTokenizer.from_pretrained(smollm2)
    few_shot = load_prompt_pair("few_shot")
    sequences, marks = [], []
    for item in ITEMS:
        question, answer = (Message("user", item["question"]),), item["answer"]
        response = tokenizer.encode_response(question, answer)
        encoded = offsets_of(answer, add_special_tokens=False, return_offsets_mapping=True)
        assert encoded.input_ids == response[:-1], item["id"]
        marks.append(
            np.array(
                [
                    any(token_start < end and start < token_end for start, end in item["errors"])
                    for token_start, token_end in encoded.offset_mapping
                ]
            )
        )
        prompts = [
            question,
            few_shot.better(question, answer),
            few_shot.worse(question, answer),
            shown(item["question"], item["correct"]),
            shown(item["question"], answer),
        ]
        sequences += [ScoredSequence(tokenizer.encode_prompt(prompt), response) for prompt in prompts]
    logps = iter(HuggingFaceScorer(smollm2, "float32", "cpu", 2048).score(sequences))
    suite = []
    for mark in marks:
        reference, better, worse, right, wrong = (next(logps)[:-1] for _ in range(5))
        suite.append(
            Scored(
                int(mark.argmax()),
                ~mark,
                reference,
                contrastive_rewards(better, worse),
                contrastive_rewards(right, wrong),
            )
        )
    return suite


def shown(question: str, answer: str) -> list[Message]:
    """The oracle's prompt, which contains the answer that the model should expect."""
    return [Message("user", f"{question}\n\nThe answer is: {answer}\n\nSay this answer again, word for word.")]


def auroc(errors: np.ndarray, good: np.ndarray) -> float:
    """Probability that a value of ``errors`` is above one of ``good``, ties counted half."""
    return float(np.mean((errors[:, None] > good).astype(float) + (errors[:, None] == good) / 2))


def separation(suite: list[Scored], name: str) -> float:
    """AUROC of the negative of a column: an error is expected to have a low reward, or a low log-prob."""
    errors = np.array([-getattr(scored, name)[scored.first_error] for scored in suite])
    good = np.concatenate([-getattr(scored, name)[scored.good] for scored in suite])
    return auroc(errors, good)


def test_items_are_marked_and_distinct_from_the_demonstrations():
    assert len(ITEMS) >= 24 and len({item["id"] for item in ITEMS}) == len(ITEMS)
    demonstrated = {turn.content for turn in load_prompt_pair("few_shot").turns if isinstance(turn, Message)}
    for item in ITEMS:
        assert item["question"] not in demonstrated
        assert item["correct"] != item["answer"] and item["errors"]
        for start, end in item["errors"]:
            assert 0 <= start < end <= len(item["answer"]) and item["answer"][start:end].strip() != ""


def test_auroc_by_hand():
    assert auroc(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == (1 + 1 + 0 + 0.5) / 4


def test_planted_errors_are_found(suite):
    found = {name: separation(suite, name) for name in ("few_shot", "oracle", "reference")}
    better = " (which is the better one here)" if found["reference"] > found["few_shot"] else ""
    print(
        f"\nAUROC, first error token against good tokens, {len(suite)} items: few_shot {found['few_shot']:.3f}, "
        f"oracle {found['oracle']:.3f}, plain surprisal {found['reference']:.3f}{better}"
    )
    assert found["few_shot"] >= 0.85
    assert found["oracle"] >= 0.93


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_shift_by_one_is_detected(suite, shift):
    shifted = [
        scored._replace(few_shot=np.roll(scored.few_shot, shift), oracle=np.roll(scored.oracle, shift))
        for scored in suite
    ]
    assert separation(shifted, "few_shot") < 0.85 and separation(shifted, "oracle") < 0.93


def test_mixed_up_rows_are_detected(suite):
    mixed = []
    for scored, other in zip(suite, [*suite[1:], suite[0]]):
        length = len(scored.good)
        mixed.append(
            scored._replace(few_shot=np.resize(other.few_shot, length), oracle=np.resize(other.oracle, length))
        )
    assert separation(mixed, "few_shot") < 0.85 and separation(mixed, "oracle") < 0.93
