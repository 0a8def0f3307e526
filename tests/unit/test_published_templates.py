"""Chat templates that models were published with, each with every kind of conversation.

As in :mod:`tests.unit.test_template_families`: an exact boundary, or a refusal by name. docs/CHAT_TEMPLATES.md lists
these and others that may not be copied here.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.unit.test_template_families import (
    ASKED,
    CALLED,
    CASES,
    THOUGHTS,
    TOOLS,
    TURNS,
    require_exact_further_turns,
)
from treg_megatron.data.labelled_pairs import SIDES
from treg_megatron.data.pairs import Pair
from treg_megatron.data.responses import prompt_answers, scored_response
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import FirstTurn, Message

FOLDER = Path(__file__).parents[1] / "data" / "published_templates"
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|<｜[^｜<>]+｜>|\[/?[A-Z_]{3,}\]")


class Ends(NamedTuple):
    """BOS, EOS, and what ends a turn."""

    bos: str
    eos: str
    turn: str = ""


_CHATML = Ends("<|endoftext|>", "<|im_end|>")
_DEEPSEEK = Ends("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
_LLAMA = Ends("<s>", "</s>")
_GRANITE = Ends("<|end_of_text|>", "<|end_of_text|>")
FAMILIES = {
    **dict.fromkeys(("qwen2.5", "qwen3", "qwq", "smollm2", "smollm3", "yi"), _CHATML),
    **dict.fromkeys(("deepseek-r1", "deepseek-v3.1"), _DEEPSEEK),
    **dict.fromkeys(("mistral", "mistral-nemo", "mistral-small", "mistral-small3.2", "mixtral", "tinyllama"), _LLAMA),
    **dict.fromkeys(("granite3.3", "granite4"), _GRANITE),
    "gpt-oss": Ends("<|startoftext|>", "<|return|>"),
    "olmo2": Ends("<|endoftext|>", "<|endoftext|>"),
    "phi3.5": Ends("<s>", "<|endoftext|>", "<|end|>"),
    "phi4": Ends("<|endoftext|>", "<|im_end|>"),
}

#: Templates that know tools and calls; those that render calls and no tools; those that render tools and no calls.
KNOW_TOOLS = {"qwen2.5", "qwen3", "qwq", "granite4", "mistral-nemo", "mistral-small3.2", "gpt-oss"}
KNOW_CALLS = {"deepseek-r1", "deepseek-v3.1"}
KNOW_NO_CALLS = {"granite3.3"}
ALTERNATE = {"mistral", "mistral-small", "mixtral"}
NO_CALLS = "does not render tool calls"
REFUSED = {
    **{(name, "tools"): "does not know tools" for name in FAMILIES.keys() - KNOW_TOOLS - KNOW_NO_CALLS},
    **{(name, "tools_called"): "does not know tools" for name in KNOW_CALLS},
    **{
        (name, case): "rejects a conversation of user, assistant, tool"
        if name in ALTERNATE
        else "not render tool calls"
        for name in FAMILIES.keys() - KNOW_TOOLS - KNOW_CALLS
        for case in ("called", "tools_called")
    },
}
#: Templates that render calls in a message of another kind than text.
NO_CALLS_IN_ANSWERS = {"gpt-oss"}


@pytest.fixture(scope="module")
def families(chatml, tmp_path_factory) -> dict[str, ChatTokenizer]:
    plain = json.loads(chatml._tokenizer.backend_tokenizer.to_str())
    loaded = {}
    for name, ends in FAMILIES.items():
        text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        backend = Tokenizer.from_str(json.dumps({**plain, "added_tokens": []}))
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=ends.bos, eos_token=ends.eos)
        special = [token for token in dict.fromkeys(SPECIAL.findall(text)) if token not in ends]
        fast.add_special_tokens({"additional_special_tokens": [*special, *filter(None, ends[2:])]})
        loaded[name] = ChatTokenizer(fast, tmp_path_factory.getbasetemp() / name, text)
    return loaded


def test_every_template_here_is_tested_and_its_source_named():
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert {path.stem for path in FOLDER.glob("*.jinja")} == set(FAMILIES)
    assert all(f"| `{name}.jinja` |" in readme for name in FAMILIES)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_boundary_is_exact_or_the_conversation_refused(families, name, case):
    tokenizer = families[name]
    messages, answer, tools = CASES[case]
    special = list(tokenizer._special.ids)
    if case == "special":
        messages = tuple(m._replace(content=m.content.format(special=" ".join(special))) for m in messages)
        answer = answer.format(special=" ".join(special), end=FAMILIES[name].eos)
    if (name, case) in REFUSED:
        with pytest.raises(UserError, match=f"the chat template of .*{name}.* ({REFUSED[name, case]})"):
            tokenizer.encode_pair(messages, [answer], tools)
        return
    prompt_ids, (ids,) = tokenizer.encode_pair(messages, [answer], tools)
    prompt, response, end = (tokenizer.decode(part) for part in (prompt_ids, ids[:-1], ids[-1:]))
    assert [i in tokenizer._special_ids for i in ids] == [False] * (len(ids) - 1) + [True]
    assert end == (FAMILIES[name].turn or FAMILIES[name].eos) or (name, end) == ("gpt-oss", "<|end|>")
    assert response.strip() in (answer.strip(), answer.removeprefix("<think>\n").strip())
    if not (name.startswith("deepseek") and case == "thoughts"):  # which the template drops, and a model does not
        whole = tokenizer._template.render([*messages, Message("assistant", answer)], False, tools)
        assert whole.startswith(prompt + response)
    for message in messages:
        if message.content and THOUGHTS not in message.content:
            assert message.content in prompt or json.dumps(message.content)[1:-1] in prompt
    assert ("add_up" in prompt) == (case in ("tools", "called", "tools_called"))


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_a_pair_are_shared_whatever_its_answers_bring(families, name):
    tokenizer = families[name]
    for answers in (("Four.", "Five."), (THOUGHTS, "Five."), (THOUGHTS, THOUGHTS + "!")):
        prompt, responses = tokenizer.encode_pair(TURNS, answers)
        begin = tokenizer.decode(prompt)
        for answer, ids in zip(answers, responses, strict=True):
            text = ("<think>\n" if begin.endswith("<think>\n") else "") + tokenizer.decode(ids[:-1])
            text = text.removeprefix("<think>\n\n</think>\n\n").removeprefix("</think>")
            assert text.strip() == answer.strip()


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_of_several_turns_is_what_the_template_renders(families, name):
    tokenizer = families[name]
    turns = (Message("assistant", "Which one?"), Message("user", "The second."), Message("assistant", "Four."))
    answers = [FirstTurn(turns[0].content), FirstTurn(turns[0].content)]
    prompt = tokenizer.encode_prompt((ASKED,), answers=answers)
    ids, written = tokenizer.encode_turns((ASKED,), turns, answers=answers)
    whole = tokenizer._template.render([ASKED, *turns], False)
    assert whole.startswith(tokenizer.decode([*prompt, *ids[:-1]]))
    parts = tokenizer.decode([token for token, mine in zip(ids, written, strict=True) if mine])
    ends = {tokenizer.decode([i]) for i, mine in zip(ids, written, strict=True) if mine and i in tokenizer._special_ids}
    for end in ends:
        parts = parts.replace(end, "|")
    assert re.fullmatch(r" ?Which one\?\| ?Four\.\|", parts)
    assert "The second." in tokenizer.decode([token for token, mine in zip(ids, written, strict=True) if not mine])


@pytest.mark.parametrize("turns", [(*CALLED[1:], Message("assistant", "Two.")), CALLED[1:2]])
@pytest.mark.parametrize("name", sorted(KNOW_TOOLS))
def test_calls_of_tools_in_an_answer_are_exact_or_refused(families, name, turns):
    tokenizer = families[name]
    answers = [FirstTurn("") if len(turns) > 1 else ""]
    if name in NO_CALLS_IN_ANSWERS:
        with pytest.raises(UserError, match="renders a prompt differently once a call of a tool follows"):
            tokenizer.encode_turns((ASKED,), turns, TOOLS, answers)
        return
    prompt = tokenizer.encode_prompt((ASKED,), TOOLS, answers)
    ids, written = tokenizer.encode_turns((ASKED,), turns, TOOLS, answers)
    whole = tokenizer._template.render([ASKED, *turns], False, TOOLS)
    assert whole.startswith(tokenizer.decode([*prompt, *ids]))
    mine = tokenizer.decode([token for token, by_it in zip(ids, written, strict=True) if by_it])
    others = tokenizer.decode([token for token, by_it in zip(ids, written, strict=True) if not by_it])
    assert "add_up" in mine and mine.count(FAMILIES[name].eos) == (len(turns) + 1) // 2
    assert ("the sum is 2" in others) == (len(turns) > 1) and "the sum is 2" not in mine


def test_turns_one_by_one_continue_no_other_prompt_than_that_of_one_turn(families):
    tokenizer = families["qwen3"]
    tokenizer._encode_turn_by_turn((ASKED,), CALLED[1:2], TOOLS, [""])
    with pytest.raises(UserError, match="differently once others follow"):
        tokenizer._encode_turn_by_turn((ASKED,), CALLED[1:2], TOOLS, [FirstTurn("")])


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1"])
def test_thoughts_in_an_answer_of_several_turns_are_refused_where_they_would_be_dropped(families, name):
    turns = (Message("assistant", THOUGHTS), Message("user", "And 2 + 2?"), Message("assistant", "Four."))
    with pytest.raises(UserError, match="differently once others follow"):
        families[name].encode_turns((ASKED,), turns, answers=[FirstTurn(THOUGHTS), FirstTurn(THOUGHTS)])


@pytest.mark.parametrize("name", ["qwen3", "deepseek-r1", "deepseek-v3.1", "mistral", "qwen2.5"])
def test_one_turn_and_several_share_their_prompt(families, name):
    tokenizer = families[name]
    turns = (Message("assistant", "Which one?"), Message("user", "The second."), Message("assistant", "Four."))
    pair = Pair("p", (ASKED,), "Which one? ...", "Two.", chosen_turns=turns)
    prompt = tokenizer.decode(tokenizer.encode_prompt(pair.messages, answers=prompt_answers(pair)))
    several, single = (tokenizer.decode(scored_response(pair, side, tokenizer)[0][:-1]) for side in SIDES)
    template = tokenizer._template
    assert template.render([ASKED, *turns], False).startswith(prompt + several)
    assert template.render([ASKED, Message("assistant", "Two.")], False).startswith(prompt + single)


def test_a_call_and_a_text_share_the_prompt_of_answers_without_thoughts(families):
    tokenizer = families["qwen3"]
    pair = Pair("p", (ASKED,), "", "Two.", tools=TOOLS, chosen_turns=CALLED[1:2])
    prompt = tokenizer.decode(tokenizer.encode_prompt(pair.messages, TOOLS, prompt_answers(pair)))
    call, text = (tokenizer.decode(scored_response(pair, side, tokenizer)[0]) for side in SIDES)
    assert prompt.endswith("<think>\n\n</think>\n\n") and text == "Two.<|im_end|>" and "<think>" not in call
    assert tokenizer._template.render([ASKED, CALLED[1]], False, TOOLS).startswith(prompt + call)


#: Templates that render an answer differently once turns follow, and those that drop its thoughts then.
NO_FURTHER_TURNS = {"qwen3", "gpt-oss"}
DROP_THOUGHTS = {"deepseek-r1", "deepseek-v3.1", "qwq"}


@pytest.mark.parametrize("name", FAMILIES)
def test_further_turns_continue_prompt_and_answer_or_are_refused(families, name):
    require_exact_further_turns(families[name], name in NO_FURTHER_TURNS, name in DROP_THOUGHTS)
