"""Preference files are read as pairs; unusable records are named by file and row, or counted."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treg_megatron.containers import json_rows as rows
from treg_megatron.data import pairs
from treg_megatron.data.inspection import as_lines, inspect_pairs
from treg_megatron.data.pairs import Reading, read_pairs
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.conversation import Message

EXPECTED = (Message("user", "Hi?"), Message("assistant", "Yes?"), Message("user", "Why?"))
SAME_PAIR = {
    "trl messages": {
        "prompt": [
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Why?"},
        ],
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    "trl messages, text answers": {
        "prompt": [
            {"role": "user", "content": "Hi?"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": "Why?"},
        ],
        "chosen": "Because.",
        "rejected": "No.",
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "Hi?"},
            {"from": "gpt", "value": "Yes?"},
            {"from": "human", "value": "Why?"},
        ],
        "chosen": {"from": "gpt", "value": "Because."},
        "rejected": {"from": "gpt", "value": "No."},
    },
}


def row(prompt="Q", chosen="good", rejected="bad", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def jsonl(path, *rows):
    return write(path, "".join(json.dumps(r) + "\n" for r in rows))


@pytest.mark.parametrize("form", SAME_PAIR)
@pytest.mark.parametrize("layout", ["array", "jsonl"])
def test_every_form_gives_the_same_pair(tmp_path, form, layout):
    text = json.dumps([SAME_PAIR[form]], indent=1) if layout == "array" else json.dumps(SAME_PAIR[form]) + "\n\n"
    (pair,) = read_pairs(write(tmp_path / "p", text))
    assert (pair.messages, pair.chosen, pair.rejected) == (EXPECTED, "Because.", "No.")
    assert pair.pair_id == next(iter(read_pairs(jsonl(tmp_path / "q", SAME_PAIR["trl messages"])))).pair_id


def test_plain_text_prompt_is_one_user_turn(tmp_path):
    (pair,) = read_pairs(jsonl(tmp_path / "p", row(id=7, score_chosen=2, rejected_score=0.5)))
    assert pair.messages == (Message("user", "Q"),)
    assert (pair.pair_id, pair.chosen_score, pair.rejected_score) == ("7", 2.0, 0.5)


def test_a_weight_comes_from_its_column_or_the_one_named(tmp_path):
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    weights = [0, "2.5", None, float("nan"), 1000.0]
    path = jsonl(tmp_path / "p", *(row(f"Q{i}", pair_weight=weight) for i, weight in enumerate(weights)))
    for reading in (Reading(), Reading(columns=columns)):
        assert [pair.pair_weight for pair in read_pairs(path, reading=reading)] == [0, 2.5, None, None, 1000]
    named = Reading(columns={**columns, "pair_weight": "meta.w"})
    (pair,) = read_pairs(jsonl(tmp_path / "q", row(meta={"w": 0.5})), reading=named)
    assert pair.pair_weight == 0.5
    assert "with a weight: 3, from 0 to 1000; the others weigh 1" in as_lines(inspect_pairs(path))
    for wrong in (-1, 1001, float("inf"), True, "heavy", [1]):
        with pytest.raises(UserError, match="row 1: pair_weight is .*: it must be a number from 0 to 1000"):
            list(read_pairs(jsonl(tmp_path / "p", row(pair_weight=wrong))))


def test_system_comes_from_its_column_or_the_first_turn(tmp_path):
    own = dict(SAME_PAIR["sharegpt"], system="Be kind.")
    turn = dict(SAME_PAIR["sharegpt"])
    turn["conversations"] = [{"from": "system", "value": "Be kind."}, *turn["conversations"]]
    for form in (own, turn):
        (pair,) = read_pairs(jsonl(tmp_path / "p", form))
        assert pair.messages == (Message("system", "Be kind."), *EXPECTED)


def test_identical_responses_and_repeated_rows_are_counted(tmp_path):
    drops = Counter()
    kept = list(read_pairs(jsonl(tmp_path / "p", row(), row(chosen="bad"), row(), row("other"), row()), drops))
    assert [pair.messages[0].content for pair in kept] == ["Q", "other"]
    assert drops == {pairs.IDENTICAL_RESPONSES: 1, pairs.REPEATED_PAIR: 2}


GOOD = json.dumps(row("first"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no pairs"),
        ("[]", "holds no pairs"),
        (GOOD + '\n{"prompt": \n', "row 2 does not parse as JSON"),
        (f'[{GOOD}, {{"prompt": nope}}, {GOOD}]', "row 2 does not parse as JSON"),
        (f"[{GOOD}, {GOOD[:-4]}", "row 2 does not parse as JSON"),
        (f"[{GOOD}", "row 1 is not followed by ',' or ']' but by the end of the file"),
        (f"[{GOOD} {GOOD}]", "row 1 is not followed by ',' or ']'"),
        (f"[{GOOD},]", "row 2 does not parse as JSON"),
        (f"[{GOOD}] x", "'x' follows the closing ']'"),
        (GOOD + "\n[1]\n", "row 2: expected a JSON object, got list"),
        ("[" * 100_000, "row 1 does not parse as JSON"),
        (
            json.dumps({"question": "?"}),
            "unrecognised preference format with keys 'question'; nearest: orca lacks chosen",
        ),
        (GOOD + "\n" + json.dumps({"prompt": "Q", "chosen": "a"}), "row 2: key 'rejected' is missing"),
        (json.dumps(row(chosen=" \n")), "row 1: chosen is an empty response"),
        (json.dumps(row(rejected=3)), "row 1: rejected must be a list of messages, got int"),
        (
            json.dumps(row(prompt=[{"role": "user"}])),
            "each message of prompt must be an object with 'role' and 'content'",
        ),
        (json.dumps(row(prompt=[{"role": "robot", "content": ""}])), "unknown role 'robot' in prompt"),
        (json.dumps(row(prompt=[{"role": "assistant", "content": "x"}])), "must end with a user turn"),
        (json.dumps(row(prompt=[])), "must end with a user turn"),
        ("\n".join(json.dumps(row(q, id="a")) for q in "xy"), "row 2: pair_id 'a' already belongs to an earlier row"),
        (json.dumps(row("\ud800")), "row 1: text with half of a surrogate pair"),
    ],
)
def test_bad_input_is_named(tmp_path, text, message):
    path = write(tmp_path / "pairs.json", text)
    with pytest.raises(UserError) as error:
        list(read_pairs(path))
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_missing_file_and_broken_utf8(tmp_path):
    with pytest.raises(UserError, match="cannot be read: No such file"):
        list(read_pairs(tmp_path / "absent.json"))
    (tmp_path / "latin1").write_bytes(json.dumps(row("é"), ensure_ascii=False).encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 text after row 0"):
        list(read_pairs(tmp_path / "latin1"))


@given(
    contents=st.lists(
        st.text(st.characters(codec="utf-8"), max_size=60).filter(str.strip), min_size=1, max_size=8, unique=True
    ),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
)
def test_arrays_are_read_the_same_whatever_the_chunks(tmp_path_factory, contents, chunk, indent, ascii):
    path = tmp_path_factory.getbasetemp() / "chunks.json"
    write(path, json.dumps([row(text, number=-1.5e-7) for text in contents], indent=indent, ensure_ascii=ascii))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_CHUNK", chunk)
        assert [pair.messages[0].content for pair in read_pairs(path)] == contents


def test_a_bad_row_is_found_without_reading_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_CHUNK", 64)
    path = write(tmp_path / "p.json", f"[{GOOD}, {{'prompt'" + " " * 100_000 + "]")
    with pytest.raises(UserError, match="row 2"), open(path, "rb") as stream:
        stream.read(1)
        try:
            list(rows._elements(rows._Lookahead(stream), path, 0))
        finally:
            assert stream.tell() < 20_000
