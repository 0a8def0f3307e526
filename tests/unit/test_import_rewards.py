"""Imported rewards are assigned to exactly the tokens that they belong to, or are refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.data.labelled_pairs import read_labelled, read_shard_metadata
from treg_megatron.data.pairs import Pair
from treg_megatron.data.streams import open_streams
from treg_megatron.errors import UserError
from treg_megatron.labelling.import_rewards import import_token_rewards, response_rewards
from treg_megatron.labelling.indexing import index
from treg_megatron.tokenizer.conversation import Message

QUESTION = (Message("user", "What is 1 + 1?"),)
ANSWER = "It is two, \U0001f469\u200d\U0001f680!"


def rewards(tokenizer, row, answer=ANSWER):
    ids, values, _ = response_rewards(tokenizer, Pair("a", QUESTION, answer, "x"), "chosen", row)
    assert len(ids) == len(values) and values.dtype == np.float32
    return values.tolist()


def own(texts, values):
    return {"chosen_token_texts": texts, "chosen_token_rewards": values}


def test_by_id_with_and_without_the_end_of_turn(chatml):
    ids = chatml.encode_response(QUESTION, ANSWER)
    values = [i / 64 for i in range(len(ids))]
    assert rewards(chatml, {"chosen_token_ids": ids, "chosen_token_rewards": values}) == values
    assert rewards(chatml, {"chosen_token_ids": ids[:-1], "chosen_token_rewards": values[:-1]}) == [*values[:-1], 0.0]


def test_sampled_ids_are_taken_as_they_are(chatml):
    """A model may sample other token ids for a text than the tokenizer produces."""
    ids = [*(i for character in "Paris" for i in chatml.encode_response(QUESTION, character)[:-1]), chatml.end_of_turn]
    assert ids != chatml.encode_response(QUESTION, "Paris")
    pair = Pair("a", QUESTION, "Paris", "x", chosen_ids=tuple(ids), rejected_ids=(1,), tokenizer=chatml.sha256)
    row = {"chosen_token_ids": ids, "chosen_token_rewards": [0.25] * len(ids)}
    found, values, _ = response_rewards(chatml, pair, "chosen", row)
    assert found == ids and values.tolist() == [0.25] * len(ids)


@given(response=st.text(st.characters(codec="utf-8"), min_size=1, max_size=40).filter(str.strip), data=st.data())
def test_texts_and_spans_give_each_token_the_value_of_its_characters(chatml, response, data):
    spans = chatml.encode_response_with_spans(QUESTION, response)[1].tolist()
    edges = sorted({0, len(response)} | {start for start, _ in spans})
    edges = [0, *sorted(data.draw(st.sets(st.sampled_from(edges[1:-1]))) if edges[1:-1] else []), len(response)]
    edges = [e for e in edges if all(not start < e < end for start, end in spans)]
    values = [(i + 1) / 128 for i in range(len(edges) - 1)]
    expected = [values[np.searchsorted(edges, start, side="right") - 1] for start, _ in spans] + [0.0]
    texts = [response[a:b] for a, b in zip(edges, edges[1:])]
    assert rewards(chatml, own(texts, values), response) == expected
    as_spans = [[a, b, v] for a, b, v in zip(edges, edges[1:], values)]
    assert rewards(chatml, {"chosen_spans": as_spans}, response) == expected


WORDS = "The  capital is two."


def test_a_word_is_covered_with_and_without_the_space_before_it(chatml):
    """Tokens own the space before a word, people mark the word."""
    spans = chatml.encode_response_with_spans(QUESTION, WORDS)[1].tolist()
    assert WORDS[4:12] == " capital" and [4, 12] in spans
    pair = Pair("a", QUESTION, WORDS, "x")
    exact, snapped, wide = (
        response_rewards(chatml, pair, "chosen", {"chosen_spans": [[first, 12, 0.5]]}) for first in (4, 5, 3)
    )
    assert exact[1].tolist() == snapped[1].tolist() == [0.5 * ([4, 12] == span) for span in spans] + [0.0]
    assert (exact[2], snapped[2], wide[2]) == (0, 1, 0)


@pytest.mark.parametrize(
    "texts, snapped", [(["The ", " capital", " is two."], 0), (["The  ", "capital ", "is two."], 3)]
)
def test_texts_of_words_with_the_space_on_either_side(chatml, texts, snapped):
    spans = chatml.encode_response_with_spans(QUESTION, WORDS)[1].tolist()
    row = own(texts, [0.125, 0.25, 0.5])
    _, values, found = response_rewards(chatml, Pair("a", QUESTION, WORDS, "x"), "chosen", row)
    assert values.tolist() == [0.125 if e <= 4 else 0.25 if e <= 12 else 0.5 for _, e in spans] + [0.0]
    assert found == snapped


def test_white_space_alone_needs_a_whole_cover(chatml):
    answer = "a\n\nb"
    spans = chatml.encode_response_with_spans(QUESTION, answer)[1].tolist()
    for first, last in ((1, 2), (1, 3)):
        pair = Pair("a", QUESTION, answer, "x")
        _, values, snapped = response_rewards(chatml, pair, "chosen", {"chosen_spans": [[first, last, 0.5]]})
        assert values.tolist() == [0.5 * (first <= s and e <= last) for s, e in spans] + [0.0]
        assert snapped == any(s < last < e for s, e in spans)


@pytest.mark.parametrize("first, last", [(6, 12), (4, 11), (0, 7)])
def test_a_span_of_a_part_of_a_word_is_refused(chatml, first, last):
    message = f"' capital' .characters 4 to 12. is one token, but the reward for characters {first} to {last} covers"
    with pytest.raises(ValueError, match=message):
        rewards(chatml, {"chosen_spans": [[first, last, 0.1]]}, WORDS)


def test_tokens_without_a_span_get_reward_zero(chatml):
    values = rewards(chatml, {"chosen_spans": [{"start": 0, "end": 2, "reward": 0.5}]}, "12345")
    assert values == [0.5, 0.5, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, "chosen has no token rewards"),
        ({"chosen_token_ids": [1], "chosen_token_rewards": [0.0]}, "they differ at token 0"),
        (own(["It is"], [0.1]), "concatenated, are not the chosen response"),
        (own([ANSWER], [0.1, 0.2]), "has 2 values for 1 texts"),
        (own([ANSWER], [0.7]), "a token reward of 0.7, outside [-0.5, 0.5]"),
        (own([ANSWER], [float("nan")]), "must be a list of finite numbers"),
        (own(ANSWER, [0.1]), "must be a list of texts"),
        ({"chosen_spans": [[4, 7, 0.1]]}, "do not line up with our tokens"),
        ({"chosen_spans": [[0, 99, 0.1]]}, "spans must be in order, must not overlap"),
        ({"chosen_spans": [[3, 5, 0.1], [0, 2, 0.1]]}, "spans must be in order, must not overlap"),
        ({"chosen_spans": [[0, 2]]}, "which is not [first character"),
    ],
)
def test_what_does_not_line_up_is_refused(chatml, row, message):
    with pytest.raises(ValueError) as error:
        rewards(chatml, row)
    assert message in str(error.value)


def test_answers_of_several_turns_are_refused(chatml):
    """Their text is for people to read: spans over it would meet other tokens than those that are trained."""
    turns = (Message("assistant", "Which?"), Message("user", "Any."), Message("assistant", "This."))
    pair = Pair("p", (Message("user", "Q?"),), "Assistant: Which?", "No.", chosen_turns=turns)
    with pytest.raises(UserError, match="chosen has several turns or calls a tool"):
        response_rewards(chatml, pair, "chosen", {"chosen_spans": []})


def test_from_a_file_of_rewards_to_streams(tokenizer_folders, chatml, tmp_path):
    rows = [
        {
            "prompt": f"{i}?",
            "chosen": "Paris",
            "rejected": "It is",
            "chosen_spans": [[0, 5, 0.25]],
            "rejected_token_texts": ["It is"],
            "rejected_token_rewards": [-0.25],
        }
        for i in range(3)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = [
        f"model.hf={tokenizer_folders['chatml']}",
        f"label.pairs={tmp_path}/own.jsonl",
        f"label.output={tmp_path}/own.parquet",
        f"index.output={tmp_path}/train",
    ]
    recipe = load_recipe(overrides=overrides)
    assert import_token_rewards(section(recipe, "label"), scorer=None) == {
        "file": f"{tmp_path}/own.parquet",
        "pairs": 3,
        "drops": {},
        "snapped_spans": 0,
    }
    assert [pair.chosen for pair in read_labelled(tmp_path / "own.parquet")] == ["Paris"] * 3
    index(section(recipe, "index"))
    record = open_streams(tmp_path / "train")[2]
    assert record.chosen_ref_logprobs is None and set(record.chosen_token_rewards[:-1]) == {0.25}
    assert chatml.decode(record.chosen_tokens).endswith("Paris<|im_end|>") and record.chosen_token_rewards[-1] == 0


def test_a_row_without_rewards_is_named(tokenizer_folders, tmp_path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"id": "p7", "prompt": "?", "chosen": "a", "rejected": "b"}))
    recipe = load_recipe(
        overrides=[
            f"model.hf={tokenizer_folders['chatml']}",
            f"label.pairs={tmp_path}/own.jsonl",
            f"label.output={tmp_path}/own.parquet",
        ]
    )
    with pytest.raises(UserError, match="own.jsonl, pair p7: chosen has no token rewards"):
        import_token_rewards(section(recipe, "label"), scorer=None)
    assert not (tmp_path / "own.parquet").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_snapped_spans_are_counted(tokenizer_folders, tmp_path, workers):
    row = {"chosen": WORDS, "rejected": "It is", "chosen_spans": [[5, 12, 0.25]], "rejected_spans": [[0, 5, -0.25]]}
    rows = [{"prompt": f"{i}?", **row} for i in range(70)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [f"model.hf={tokenizer_folders['chatml']}", f"index.output={tmp_path}/{workers}"]
    recipe = load_recipe(
        overrides=[*common, f"label.pairs={tmp_path}/own.jsonl", f"label.output={tmp_path}/own.parquet"]
    )
    assert import_token_rewards(section(recipe, "label"), scorer=None)["snapped_spans"] == 70
    assert read_shard_metadata(tmp_path / "own.parquet")["snapped_spans"] == 70
    recipe = load_recipe(overrides=[*common, f"index.labelled={tmp_path}/own.jsonl", f"index.workers={workers}"])
    assert index(section(recipe, "index"))["labels"]["snapped_spans"] == 70
