"""The demo's preference pairs match the README, and the held-out pairs do not occur in training."""

import json
from pathlib import Path

import pytest

PAIRS = Path(__file__).resolve().parents[2] / "demo" / "pairs"
FEWEST = {"train": 48, "heldout": 16}


@pytest.fixture(params=FEWEST)
def split(request):
    return request.param


def rows(split):
    return [json.loads(line) for line in (PAIRS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def responses(row):
    return row["chosen"][0]["content"], row["rejected"][0]["content"]


def question(row):
    return " ".join(message["content"].lower() for message in row["prompt"] if message["role"] != "system")


def test_there_are_enough_pairs_for_the_demo_and_its_validation(split):
    assert len(rows(split)) >= FEWEST[split]


def test_every_row_is_the_explicit_prompt_form_that_ends_with_a_user_turn(split):
    for row in rows(split):
        assert list(row) == ["pair_id", "prompt", "chosen", "rejected"]
        roles = [message["role"] for message in row["prompt"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"], row["pair_id"]
        for key in ("chosen", "rejected"):
            assert [message["role"] for message in row[key]] == ["assistant"], row["pair_id"]
        for message in row["prompt"] + row["chosen"] + row["rejected"]:
            assert set(message) == {"role", "content"}
            assert message["content"] == message["content"].strip() != "", row["pair_id"]


def test_responses_differ_and_are_short(split):
    for row in rows(split):
        chosen, rejected = responses(row)
        assert chosen != rejected, row["pair_id"]
        assert 3 <= len(chosen.split()) <= 40 and 3 <= len(rejected.split()) <= 40, row["pair_id"]


def test_length_alone_does_not_tell_chosen_from_rejected(split):
    lengths = [[len(response.split()) for response in responses(row)] for row in rows(split)]
    chosen, rejected = map(sum, zip(*lengths))
    assert 0.9 < chosen / rejected < 1.1


def test_no_prompt_or_id_occurs_twice_in_the_two_files_together():
    everything = rows("train") + rows("heldout")
    assert len({question(row) for row in everything}) == len(everything)
    ids = {split: [row["pair_id"] for row in rows(split)] for split in FEWEST}
    assert len({*ids["train"], *ids["heldout"]}) == len(everything)


def test_no_answer_of_a_heldout_pair_was_trained_on():
    trained = {response for row in rows("train") for response in responses(row)}
    assert trained.isdisjoint(response for row in rows("heldout") for response in responses(row))


def test_system_messages_and_several_turns_occur_in_both_files(split):
    first_roles = {row["prompt"][0]["role"] for row in rows(split)}
    assert first_roles == {"system", "user"}
    assert any(len(row["prompt"]) >= 3 for row in rows(split))
