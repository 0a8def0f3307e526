"""Every preference format, by a record shaped like its public datasets; and columns that no format may drop."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support.pair_formats import BAD, EXAMPLES, GOOD, TURNS, USER
from treg_megatron.data import inspection
from treg_megatron.data.inspection import as_text, inspect_pairs
from treg_megatron.data.inspection_page import write_page
from treg_megatron.data.pairs import EQUAL_SCORES, NO_ID, NO_SCORE, Reading, read_pairs
from treg_megatron.errors import UserError
from treg_megatron.formats import FORMATS, recognise
from treg_megatron.tokenizer.conversation import Message

BIRD = (Message("user", "Name a bird."),)
TRL = {"prompt": "Name a bird.", "chosen": "Robin.", "rejected": "Bat."}
MEANINGFUL_COLUMNS = """
    audio background choices context conversation demonstrations developer_message dialogue documents evidence
    few_shot_examples files functions grounding history image images input instruction knowledge_context memory
    messages_before multimodal_input passage persona pictures preamble prefix problem prompt_context query question
    questions reasoning_content retrieved_documents scratchpad system system_prompt thinking tools video
""".split()


def read(folder, *rows, reading=None, **options):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_pairs(path, reading=reading, **options))


def test_every_format_has_an_example():
    assert set(EXAMPLES) == {format.name for format in FORMATS}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_format_is_recognised_and_gives_its_pair(tmp_path, name):
    row, scores = EXAMPLES[name]
    by_name_only = next(format for format in FORMATS if format.name == name).by_name_only
    if by_name_only:
        with pytest.raises(ValueError, match=f"--format {name}"):
            recognise(row)
    elif name != "pku_safer":  # asked for by name: the same columns are read as pku_better
        assert recognise(row).name == name
    (pair,) = read(tmp_path, row, reading=Reading(name))
    assert (pair.messages, pair.chosen, pair.rejected) == (BIRD, "Robin.", "Bat.")
    assert (pair.chosen_score, pair.rejected_score) == (scores or (None, None))


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_format_drops_a_column_that_carries_meaning(tmp_path, name):
    row, _ = EXAMPLES[name]
    assert len(MEANINGFUL_COLUMNS) >= 40
    for column in MEANINGFUL_COLUMNS:
        if row.get(column):
            continue  # the format's own
        text = "Answer in one word."
        try:
            (pair,) = read(
                tmp_path, {**row, column: [[text, "A"]] if column == "history" else text}, reading=Reading(name)
            )
        except UserError as error:
            assert column in str(error)
        else:
            assert any(text in message.content for message in pair.messages), (column, pair)


def test_the_documentation_names_every_format_and_its_datasets():
    documented = (Path(__file__).resolve().parents[2] / "docs" / "DATA_FORMATS.md").read_text(encoding="utf-8")
    for format in FORMATS:
        for name in (format.name, *format.hub):
            assert f"`{name}`" in documented, name


@pytest.mark.parametrize("column", ["prompt_id", "input_tokens", "task_category", "source", "model", "turns", "labels"])
def test_columns_about_the_data_are_no_reason_to_refuse(tmp_path, column):
    assert len(read(tmp_path, {**TRL, column: 3 if column == "turns" else "x"})) == 1


def test_columns_can_be_left_out_on_purpose(tmp_path):
    row = {**TRL, "images": ["cat.png"]}
    with pytest.raises(UserError, match="row 1: column 'images' would not be used.*--columns.*--ignore images"):
        read(tmp_path, row)
    assert len(read(tmp_path, row, reading=Reading(ignore=("images",)))) == 1
    (pair,) = read(tmp_path, {**TRL, "system": "Be brief."}, reading=Reading(ignore=("system",)))
    assert pair.messages == BIRD


@pytest.mark.parametrize("name", ["trl", "orca", "alpaca", "sharegpt", "hh", "helpsteer3", "nectar", "simpo"])
def test_a_system_message_history_and_tools_beside_any_format(tmp_path, name):
    row, _ = EXAMPLES[name]
    tools = [{"type": "function", "function": {"name": "look"}}]
    beside = {"system": "Be brief.", "history": [["Name a fish.", "Cod."]], "tools": json.dumps(tools)}
    (pair,) = read(tmp_path, {**row, **beside})
    assert pair.messages == (
        Message("system", "Be brief."),
        Message("user", "Name a fish."),
        Message("assistant", "Cod."),
        *BIRD,
    )
    assert json.loads(pair.tools) == tools
    (same,) = read(tmp_path, row)
    assert pair.pair_id != same.pair_id or "id" in row


def test_a_second_system_message_contradicts(tmp_path):
    row = {"prompt": [{"role": "system", "content": "Be brief."}, *USER], "chosen": "Robin.", "rejected": "Bat."}
    assert read(tmp_path, {**row, "system": "Be brief."})[0].messages[0].content == "Be brief."
    with pytest.raises(UserError, match="system is not the system message that the conversation begins with"):
        read(tmp_path, {**row, "system": "Be long."})


@pytest.mark.parametrize(
    "form",
    [
        {"prompt": json.dumps(USER), "chosen": json.dumps(GOOD[1:]), "rejected": json.dumps(BAD[1:])},
        {"prompt": USER, "chosen": GOOD, "rejected": BAD},
        {
            side: {"role": ["user", "assistant"], "content": ["Name a bird.", answer]}
            for side, answer in (("chosen", "Robin."), ("rejected", "Bat."))
        },
        {
            "prompt": [{"role": "Human", "content": [{"type": "text", "text": "Name a "}, {"text": "bird."}]}],
            "chosen": {"role": "Assistant", "content": "Robin."},
            "rejected": [{"from": "gpt", "value": "Bat."}],
        },
        {"chosen": "Human: Name a bird.\n\nAssistant: Robin.", "rejected": "Human: Name a bird.\n\nAssistant: Bat."},
        {
            "chosen": "### Human: Name a bird.\n### Assistant: Robin.",
            "rejected": "### Human: Name a bird.\n### Assistant: Bat.",
        },
        {"prompt": TURNS, "chosen": "Robin.", "rejected": "Bat."},
    ],
    ids=["JSON text", "whole after prompt", "struct of lists", "parts and roles", "HH stripped", "headed", "HH prompt"],
)
def test_other_notations_of_the_same_pair(tmp_path, form):
    (pair,) = read(tmp_path, form)
    assert (pair.messages, pair.chosen, pair.rejected) == (BIRD, "Robin.", "Bat.")


ASKED = [*USER, {"role": "assistant", "content": "Which kind?"}, {"role": "user", "content": "Any."}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "look"}}]}


@pytest.mark.parametrize(
    "row, common, chosen, rejected",
    [
        ({"chosen": [*ASKED, GOOD[1]], "rejected": BAD}, 1, "assistant user assistant", ""),
        ({"prompt": USER, "chosen": GOOD[1:], "rejected": [*ASKED[1:], BAD[1]]}, 1, "", "assistant user assistant"),
        ({"chosen": [*ASKED, GOOD[1]], "rejected": [*ASKED, BAD[1]]}, 3, "", ""),
        (
            {"prompt": USER, "chosen": [CALL, {"role": "tool", "content": "a robin"}, GOOD[1]], "rejected": [CALL]},
            1,
            "assistant tool assistant",
            "assistant",
        ),
        (
            {
                "chosen": f"{TURNS} Which?\n\nHuman: Any.\n\nAssistant: Robin.",
                "rejected": f"{TURNS} Why?\n\nHuman: So.\n\nAssistant: Bat.",
            },
            1,
            "assistant user assistant",
            "assistant user assistant",
        ),
    ],
)
def test_answers_of_several_turns_begin_where_the_sides_part(tmp_path, row, common, chosen, rejected):
    (pair,) = read(tmp_path, row)
    assert len(pair.messages) == common
    assert " ".join(turn.role for turn in pair.chosen_turns) == chosen
    assert " ".join(turn.role for turn in pair.rejected_turns) == rejected


def test_sides_that_part_at_a_users_turn_are_refused(tmp_path):
    other = [{"role": "user", "content": "Name a fish."}, BAD[1]]
    with pytest.raises(UserError, match="the same conversation up to a turn of the assistant"):
        read(tmp_path, {"chosen": GOOD, "rejected": other})


def test_instruction_and_input_are_one_turn(tmp_path):
    row = {"instruction": "Translate.", "input": "Good morning", "chosen": "Bonjour", "rejected": "Bonsoir"}
    assert read(tmp_path, row)[0].messages == (Message("user", "Translate.\nGood morning"),)


def test_a_tool_conversation_keeps_calls_and_results(tmp_path):
    call = [{"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}]
    prompt = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "tool", "name": "weather", "content": "4 degrees"},
    ]
    (pair,) = read(tmp_path, {"prompt": prompt, "chosen": "It is cold.", "rejected": "No idea."})
    assert [message.role for message in pair.messages] == ["system", "user", "assistant", "tool"]
    assert pair.messages[2].as_dict() == {"role": "assistant", "content": "", "tool_calls": call}
    assert pair.messages[3].as_dict() == {"role": "tool", "content": "4 degrees", "name": "weather"}


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "<|im_start|>user\nHi", "chosen": "a", "rejected": "b"}, r"chat template \(<\|im_start\|>\)"),
        ({"prompt": "Hi", "chosen": "a<|im_end|>\n", "rejected": "b<|im_end|>"}, r"both answers end with <\|im_end\|>"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "a user turn is empty"),
        (
            {"chosen": f"{TURNS} a\n\nHuman: Bye.", "rejected": f"{TURNS} b"},
            "chosen must end with an `Assistant:` turn",
        ),
        ({"chosen": "Robin.", "rejected": "Bat."}, "have no prompt beside them.*--format trl_implicit_text.*--columns"),
        ({"prompt": "a", "completion": "b", "label": True}, "KTO's data.*--columns prompt=COLUMN"),
        ({"prompt_input_ids": [1], "chosen_input_ids": [2]}, "token ids cannot be read as text"),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, "nearest: .*trl lacks rejected"),
        (
            {
                "prompt": USER,
                "chosen": {"role": "assistant", "content": "a", "reasoning_content": "b"},
                "rejected": "c",
            },
            "the answer in chosen has reasoning_content beside its content",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}], "chosen": "a", "rejected": "b"},
            "has a part of type image_url: only text",
        ),
        (
            {"prompt": [{"role": "user", "content": "a", "images": ["b.png"]}], "chosen": "a", "rejected": "b"},
            "has 'images': only text",
        ),
        ({**EXAMPLES["pku_better"][0], "better_response_id": 2}, "better_response_id must be 0 or 1"),
        ({**EXAMPLES["openai"][0], "input": {"prompt": "a"}}, "input must be an object with 'messages'"),
        ({**TRL, "tools": "look()"}, "tools is not the JSON text"),
        ({**TRL, "history": ["a"]}, "history must be a list of messages, or of pairs"),
    ],
)
def test_what_would_train_on_something_else_is_refused(tmp_path, row, message):
    with pytest.raises(UserError, match=f"pairs.jsonl row 1: .*{message}"):
        read(tmp_path, row)


@pytest.mark.parametrize(
    "row",
    [
        {**EXAMPLES["helpsteer3"][0], "overall_preference": 0},
        {**EXAMPLES["ultrafeedback"][0], "score_rejected": 8},
        {**EXAMPLES["orca_argilla"][0], "status": "tie"},
        {**EXAMPLES["trl"][0], "chosen-rating": 3, "rejected-rating": 3.0},
        {**EXAMPLES["distilabel"][0], "ratings": [3, 3, None]},
        {**EXAMPLES["nectar"][0], "answers": [{"answer": "a", "rank": 1.0}, {"answer": "b", "rank": 1.0}]},
    ],
)
def test_ties_are_left_out_and_counted(tmp_path, row):
    drops = Counter()
    assert read(tmp_path, row, drops=drops) == [] and drops == {EQUAL_SCORES: 1}


def test_scores_and_ids_that_cannot_be_used_are_none_and_counted(tmp_path):
    notes = Counter()
    rows = [
        {**TRL, "id": 1.0, "chosen_score": "8", "rejected_score": "2"},
        {**TRL, "prompt": "b", "id": "", "chosen_score": "good", "rejected_score": True},
        {**TRL, "prompt": "c", "id": 1.5, "chosen_score": float("nan")},
    ]
    pairs = read(tmp_path, *rows, notes=notes)
    assert pairs[0].pair_id == "1" and (pairs[0].chosen_score, pairs[0].rejected_score) == (8.0, 2.0)
    assert pairs[1].chosen_score is None and pairs[2].chosen_score is None
    assert notes == {NO_ID: 2, NO_SCORE: 2}


@pytest.mark.parametrize(
    "row, columns",
    [
        ({"q": "Name a bird.", "good": "Robin.", "bad": "Bat."}, "prompt=q chosen=good rejected=bad"),
        ({"x": {"q": USER}, "a": "Robin.", "b": "Bat."}, "prompt=x.q chosen=a rejected=b"),
        ({"q": "Name a bird.", "r": ["Bat.", "Robin."], "s": [1, 2]}, "prompt=q responses=r scores=s"),
    ],
)
def test_any_other_columns_by_their_names(tmp_path, row, columns):
    reading = Reading(columns=dict(word.split("=") for word in columns.split()))
    (pair,) = read(tmp_path, {**row, "key": "k1"}, reading=reading)
    assert (pair.messages, pair.chosen, pair.rejected) == (BIRD, "Robin.", "Bat.")
    (named,) = read(
        tmp_path,
        {**row, "key": "k1", "sys": "Be brief."},
        reading=Reading(columns={**reading.columns, "id": "key", "system": "sys"}),
    )
    assert named.pair_id == "k1" and named.messages == (Message("system", "Be brief."), *BIRD)


def test_sampled_ids_of_several_turns_are_refused(tmp_path):
    turns = [{"role": "assistant", "content": "Which?"}, {"role": "user", "content": "Any."}]
    several = [*turns, {"role": "assistant", "content": "Robin."}]
    row = {"prompt": "Name a bird.", "chosen": several, "rejected": "Bat.", "chosen_ids": [1], "rejected_ids": [2]}
    for ids in ({"tokenizer": "t"}, {"tokenizer": "t", "chosen": "Robin.", "rejected": several}):
        side = "rejected" if "rejected" in ids else "chosen"
        with pytest.raises(
            UserError, match=f"row 1: {side} has several turns .*: take out chosen_ids and rejected_ids"
        ):
            read(tmp_path, {**row, **ids})
    (pair,) = read(tmp_path, {**row, "chosen_ids": None, "rejected_ids": None})
    assert pair.chosen_ids is None and len(pair.chosen_turns) == 3


def test_columns_that_make_no_format_are_refused(tmp_path):
    for columns, message in (
        ({"prompt": "q"}, "names no column for chosen, rejected"),
        ({"prompt": "q", "answer": "a"}, "names 'answer', which is none of prompt, chosen"),
    ):
        with pytest.raises(UserError, match=message):
            read(tmp_path, TRL, reading=Reading(columns=columns))
    with pytest.raises(UserError, match="column 'good', named as chosen, is missing"):
        read(tmp_path, TRL, reading=Reading(columns={"prompt": "prompt", "chosen": "good", "rejected": "rejected"}))
    with pytest.raises(UserError, match="exclude each other"):
        Reading("trl", {"prompt": "q"})


def test_the_report_warns_of_what_speaks_of_a_fault(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": "a long answer", "rejected": "short"} for i in range(20)]
    rows.append({"prompt": "q1", "chosen": "short", "rejected": "a long answer"})
    rows.append({"prompt": "\x1b[2J", "chosen": "a</s>", "rejected": "b"})
    read(tmp_path, *rows)
    report = inspect_pairs(tmp_path / "pairs.jsonl", examples=22)
    text = as_text(report)
    assert "warning: 1 pairs prefer what another pair with the same prompt rejects" in text
    assert "warning: chosen is longer than rejected in 95% of the pairs" in text
    assert "warning: 1 answers end with an end-of-turn token spelled out" in text
    assert "\x1b" not in text and "\\x1b[2J" in text


def test_the_page_holds_the_report_and_injects_nothing(tmp_path):
    evil = "<script>alert(1)</script>\x1b[2J"
    rows = [{"prompt": evil + str(i), "chosen": "Да." * (i + 1), "rejected": evil, "chosen_score": i} for i in range(3)]
    rows[0]["rejected_score"] = -1
    read(tmp_path, *rows)
    write_page(tmp_path / "page.html", "pairs <of> mine", inspect_pairs(tmp_path / "pairs.jsonl", examples=2))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page and "\x1b" not in page and "&lt;script&gt;alert(1)" in page
    assert "pairs &lt;of&gt; mine" in page and "3 pairs, read as trl" in page
    assert "<th>cyrillic</th><td>3</td>" in page and "100.0%" in page
    assert page.count("<article>") == 2 and page.count("<svg") == 5  # four lengths, one score


def test_examples_are_what_training_will_see(tmp_path, chatml):
    read(tmp_path, {**TRL, "system": "Be brief."})
    (example,) = inspect_pairs(tmp_path / "pairs.jsonl", tokenizer=chatml, examples=2)["examples"]
    (pair,) = read_pairs(tmp_path / "pairs.jsonl")
    assert example["prompt"] == chatml.decode(chatml.encode_prompt(pair.messages))
    assert example["chosen"] == chatml.decode(chatml.encode_response(pair.messages, "Robin."))
    assert "Be brief." in example["prompt"] and example["prompt"].endswith("assistant\n")


def test_few_equidistant_values_have_a_bar_each_and_others_share():
    few = inspection._histogram(np.array([1.5, 0.0, 0.5, 0.5]))
    assert few["counts"] == [1, 2, 0, 1] and few["median"] == 0.5 and few["median_at"] == 1.5 / 4
    many = inspection._histogram(np.arange(100))
    assert len(many["counts"]) == 24 and sum(many["counts"]) == 100 and max(many["counts"]) == 5
    assert many["median"] in (49, 50) and abs(many["median_at"] - 0.5) < 0.01
    assert inspection._histogram(np.array([7, 7]))["counts"] == [2]
