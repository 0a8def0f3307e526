"""Prompt pairs: how they render, and errors for turns that do not fit together."""

import pytest
import yaml

from treg_megatron.errors import UserError
from treg_megatron.labelling.prompt_pair import FOLDER, load_prompt_pair
from treg_megatron.tokenizer.conversation import Message

CONVERSATION = (
    Message("system", "Be kind."),
    Message("user", "Hi?"),
    Message("assistant", "Yes?"),
    Message("user", "Why?"),
)
BUILT_IN = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def own(tmp_path, turns, better, worse):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"turns": turns, "fill": {"better": better, "worse": worse}}))
    return load_prompt_pair(path)


def user(content):
    return {"role": "user", "content": content}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_pairs_alternate_and_end_with_the_user(name):
    pair = load_prompt_pair(name)
    for messages in (pair.better(CONVERSATION[1:], "No."), pair.worse(CONVERSATION[1:], "No.")):
        assert [m.role for m in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
    assert pair.better(CONVERSATION, "No.") != pair.worse(CONVERSATION, "No.")


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_pairs_render_where_there_is_no_system_role(name, tokenizers):
    pair = load_prompt_pair(name)
    for tokenizer in tokenizers.values():
        better, worse = (tokenizer.encode_prompt(side(CONVERSATION[1:], "No.")) for side in (pair.better, pair.worse))
        assert better != worse


def test_revise_shows_conversation_and_response_in_one_turn_and_differs_late():
    pair = load_prompt_pair("revise")
    (better,), (worse,) = pair.better(CONVERSATION, "No {braces}."), pair.worse(CONVERSATION, "No {braces}.")
    assert "System: Be kind.\n\nUser: Hi?\n\nAssistant: Yes?\n\nUser: Why?" in better.content
    same = next(i for i, (a, b) in enumerate(zip(better.content, worse.content)) if a != b)
    assert "No {braces}." in better.content[:same]
    assert pair.shows_response


def test_answer_shows_the_conversation_and_not_the_response():
    pair = load_prompt_pair("answer")
    (better,), (worse,) = pair.better(CONVERSATION, "No."), pair.worse(CONVERSATION, "No.")
    assert "User: Why?" in better.content and "No." not in better.content and not pair.shows_response
    assert better.content.split("It must be ")[0] == worse.content.split("It must be ")[0]


def test_few_shot_keeps_the_conversation_and_puts_its_system_message_first():
    pair = load_prompt_pair("few_shot")
    better, worse = pair.better(CONVERSATION, "No."), pair.worse(CONVERSATION, "No.")
    assert better[0] == worse[0] == CONVERSATION[0]
    assert better[-3:] == worse[-3:] == list(CONVERSATION[1:])
    assert not any("No." in m.content for m in better)
    assert not pair.shows_response


def test_users_text_is_never_a_placeholder(tmp_path):
    pair = own(tmp_path, [user("{conversation} | {response} | {wish}")], {"wish": "good {response}"}, {"wish": "bad"})
    (message,) = pair.better((Message("user", "{response} {wish} {}"),), "{conversation}")
    assert message.content == "User: {response} {wish} {} | {conversation} | good {response}"


def test_hash_covers_the_text_and_not_the_comments(tmp_path):
    first = own(tmp_path, [user("{conversation} {wish}")], {"wish": "good"}, {"wish": "bad"})
    (tmp_path / "commented.yaml").write_text("# why\n" + (tmp_path / "own.yaml").read_text())
    assert load_prompt_pair(tmp_path / "commented.yaml").sha256 == first.sha256
    assert own(tmp_path, [user("{conversation} {wish}")], {"wish": "good"}, {"wish": "worse"}).sha256 != first.sha256


@pytest.mark.parametrize(
    "turns, better, worse, message",
    [
        (
            [user("{conversation} {wish}")],
            {"wish": "good"},
            {"hope": "bad"},
            "must have the same keys; only one has {hope}, {wish}",
        ),
        ([user("{conversation} {wish}")], {"wish": "x"}, {"wish": "x"}, "are equal: every token reward would be 0"),
        ([user("{conversation} {wish} {x}")], {"wish": "a"}, {"wish": "b"}, "no fill for placeholder {x}"),
        ([user("{conversation}")], {"wish": "a"}, {"wish": "b"}, "no turn has placeholder {wish}"),
        ([user("{response} {wish}")], {"wish": "a"}, {"wish": "b"}, "neither a turn `conversation`"),
        (
            [user("{wish}"), "conversation"],
            {"wish": "a"},
            {"wish": "b"},
            "turn 2 is the user's but must be the assistant's",
        ),
        (
            ["conversation", {"role": "assistant", "content": "{wish}"}],
            {"wish": "a"},
            {"wish": "b"},
            "last turn must be the user's",
        ),
        ([{"role": "system", "content": "{wish}"}, "conversation"], {"wish": "a"}, {"wish": "b"}, "has role 'system'"),
        ([user(3)], {"wish": "a"}, {"wish": "b"}, "turn 1 must be {role, content}"),
        (["chat"], {"wish": "a"}, {"wish": "b"}, "turn 1 must be {role, content}"),
        ([], {"wish": "a"}, {"wish": "b"}, "`turns` must be a list"),
        ([user("{conversation} {wish}")], {"wish": 1}, {"wish": "b"}, "`fill.better` must map placeholders to texts"),
        ([user("{conversation} {wish}")], {}, {}, "`fill.better` must map placeholders to texts"),
        ([user("{conversation}")], {"response": "a"}, {"response": "b"}, "redefines {response}"),
    ],
)
def test_pairs_that_do_not_fit_together_are_refused(tmp_path, turns, better, worse, message):
    with pytest.raises(UserError) as error:
        own(tmp_path, turns, better, worse)
    assert message in str(error.value)
    assert "own.yaml" in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("turns: [", "is not valid YAML"),
        ("just text", "must be a mapping with the keys `turns` and `fill`"),
        ("{turns: [conversation], fill: {better: {a: b}}}", "`fill` must have exactly the keys"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_prompt_pair(tmp_path / "own.yaml")


def test_unknown_name_lists_the_built_in_ones():
    with pytest.raises(UserError, match="answer, few_shot, revise"):
        load_prompt_pair("revize")
