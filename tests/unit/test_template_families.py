"""Templates of the shapes that model families use, each with every kind of conversation.

For each pair of a template and a conversation: the boundary is exact, the system message is there and the response ends
with one end-of-turn token; or the conversation is refused by a message that :data:`REFUSED` expects.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import FirstTurn, Message

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"


class Family(NamedTuple):
    """Special tokens, of which the first two are BOS and EOS, and the end of a turn."""

    special: str
    end: str


_DEEPSEEK = "calls_begin calls_end call_begin call_sep call_end outputs_begin outputs_end output_begin output_end"
_LLAMA3 = Family("<|begin_of_text|> <|eot_id|> <|start_header_id|> <|end_header_id|>", "<|eot_id|>")
_INST = "<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
_CHATML = Family("<|endoftext|> <|im_end|> <|im_start|>", "<|im_end|>")
FAMILIES = {
    "llama2": Family("<s> </s>", "</s>"),
    "llama3": _LLAMA3,
    "llama31": _LLAMA3,
    "mistral_v1": Family("<s> </s>", "</s>"),
    "mistral_v3": Family(_INST, "</s>"),
    "mistral_small": Family(_INST + " [SYSTEM_PROMPT] [/SYSTEM_PROMPT]", "</s>"),
    "qwen25": _CHATML,
    "qwen3": _CHATML,
    "gemma2": Family("<bos> <eos> <start_of_turn> <end_of_turn>", "<end_of_turn>"),
    "gemma3": Family("<bos> <eos> <start_of_turn> <end_of_turn>", "<end_of_turn>"),
    "phi3": Family("<s> <|endoftext|> <|end|> <|user|> <|assistant|> <|system|>", "<|end|>"),
    "phi4": Family("<|endoftext|> <|im_end|> <|im_start|> <|im_sep|>", "<|im_end|>"),
    "deepseek_v2": Family("<|begin|> <|end|>", "<|end|>"),
    "deepseek_r1": Family(
        "<|begin|> <|end|> <|User|> <|Assistant|> " + " ".join(f"<|{name}|>" for name in _DEEPSEEK.split()), "<|end|>"
    ),
    "zephyr": Family("<s> </s>", "</s>"),
    "tulu": Family("<s> </s>", "</s>"),
    "olmo2": Family("<|endoftext|> <|end|>", "<|end|>"),
    "smollm2": _CHATML,
    "yi": _CHATML,
    "command_r": Family(
        "<BOS_TOKEN> <|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|>",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "granite": Family("<|bos|> <|end_of_text|> <|start_of_role|> <|end_of_role|> <|tool_call|>", "<|end_of_text|>"),
    "falcon3": Family("<|bos|> <|endoftext|>", "<|endoftext|>"),
}

SYSTEM = Message("system", "Answer like an owl.")
ASKED = Message("user", "What is 1 + 1?")
TURNS = (ASKED, Message("assistant", "Two."), Message("user", "And 2 + 2?"))
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "add_up", "arguments": {"of": [1, 1]}}}
CALLED = (
    ASKED,
    Message("assistant", "", json.dumps({"tool_calls": [CALL]})),
    Message("tool", "the sum is 2", json.dumps({"name": "add_up", "tool_call_id": "abcdef123"})),
)
TOOLS = json.dumps([{"type": "function", "function": {"name": "add_up", "description": "Adds.", "parameters": {}}}])
THOUGHTS = "<think>\none and one\n</think>\n\nTwo."


class Case(NamedTuple):
    """A conversation, its answer, and the tools that it may call."""

    messages: tuple[Message, ...]
    answer: str = "Four."
    tools: str = ""


CASES = {
    "single": Case((ASKED,)),
    "system": Case((SYSTEM, ASKED)),
    "turns": Case(TURNS),
    "system_turns": Case((SYSTEM, *TURNS)),
    "tools": Case((ASKED,), tools=TOOLS),
    "called": Case(CALLED),
    "tools_called": Case(CALLED, tools=TOOLS),
    "spaces": Case((ASKED,), "  Four.\n"),
    "special": Case((Message("user", "What is {special}?"),), "It is {special} at the end: {end}"),
    "thoughts": Case((ASKED,), THOUGHTS),
    "earlier_thoughts": Case((ASKED, Message("assistant", THOUGHTS), Message("user", "And 2 + 2?"))),
}
KNOW_TOOLS = {"llama31", "mistral_v3", "qwen25", "qwen3", "granite"}
KNOW_CALLS = {*KNOW_TOOLS, "deepseek_r1"}  # which renders calls and their results, and no list of tools
NO_CALLS = "does not render tool calls"
REFUSED = {
    **{(name, "tools"): "does not know tools" for name in FAMILIES.keys() - KNOW_TOOLS},
    **{(name, "tools_called"): f"does not know tools|{NO_CALLS}" for name in FAMILIES.keys() - KNOW_TOOLS},
    **{(name, "called"): NO_CALLS for name in FAMILIES.keys() - KNOW_CALLS},
    **{(name, case): "rejects a conversation of user, assistant, tool.*: roles must alternate"
       for name in ("llama2", "mistral_v1", "mistral_small", "gemma2", "gemma3", "command_r")
       for case in ("called", "tools_called")},
}  # fmt: skip


@pytest.fixture(scope="module")
def families(chatml, tmp_path_factory) -> dict[str, ChatTokenizer]:
    plain = json.loads(chatml._tokenizer.backend_tokenizer.to_str())
    loaded = {}
    for name, family in FAMILIES.items():
        backend = Tokenizer.from_str(json.dumps({**plain, "added_tokens": []}))
        special = family.special.split()
        fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=special[0], eos_token=special[1])
        fast.add_special_tokens({"additional_special_tokens": special[2:]})
        text = (FOLDER / f"{name}_like.jinja").read_text()
        loaded[name] = ChatTokenizer(fast, tmp_path_factory.getbasetemp() / name, text)
    return loaded


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_boundary_is_exact_or_the_conversation_refused(families, name, case):
    tokenizer, family = families[name], FAMILIES[name]
    spelled = {"special": " ".join(family.special.split()), "end": family.end}
    messages, answer, tools = CASES[case]
    if case == "special":
        messages = tuple(message._replace(content=message.content.format(**spelled)) for message in messages)
        answer = answer.format(**spelled)
    if (name, case) in REFUSED:
        with pytest.raises(UserError, match=f"the chat template of .*{name}.* ({REFUSED[name, case]})"):
            tokenizer.encode_pair(messages, [answer], tools)
        return
    prompt_ids, (ids,) = tokenizer.encode_pair(messages, [answer], tools)
    prompt, response = tokenizer.decode(prompt_ids), tokenizer.decode(ids)
    special = tokenizer._special_ids
    assert sum(i in special for i in ids) == 1 and response.endswith(family.end), "one end-of-turn token"
    assert response.removesuffix(family.end).strip() in (answer.strip(), answer.removeprefix("<think>\n").strip())
    whole = tokenizer._template.render([*messages, Message("assistant", answer)], False, tools)
    if (name, case) == ("deepseek_r1", "thoughts"):  # the template drops them, a model does not
        assert prompt + response == whole.partition("\n\nTwo.")[0] + answer + family.end
    else:
        space = " " if name == "llama2" else ""  # of the template, between every answer and its end
        assert whole.startswith(prompt + response.removesuffix(family.end) + space + family.end)
    for message in messages:
        if message.content and THOUGHTS not in message.content:
            assert message.content in prompt or json.dumps(message.content) in prompt
    assert ("add_up" in prompt) == (case in ("tools", "called", "tools_called"))
    plain = [message._replace(content=re.sub("What is .*", "What?", message.content)) for message in messages]
    usual = tokenizer.encode_prompt(plain, tools, [answer])
    assert [i for i in prompt_ids if i in special] == [i for i in usual if i in special]


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_a_pair_are_shared_whatever_its_answers_bring(families, name):
    tokenizer = families[name]
    for answers in (("Four.", "Five."), (THOUGHTS, "Five."), (THOUGHTS, THOUGHTS + "!"), (" Four", "Five ")):
        prompt, responses = tokenizer.encode_pair(TURNS, answers)
        assert [tokenizer.encode_response(TURNS, answer, answers=answers) for answer in answers] == responses
        begin = tokenizer.decode(prompt)
        opened = "<think>\n" if begin.endswith("<think>\n") else ""
        for answer, ids in zip(answers, responses):
            text = opened + tokenizer.decode(ids[:-1])
            assert text.strip().removeprefix("<think>\n\n</think>\n\n") == answer.strip()


#: Templates that put a space between an answer and its end, which a model does not generate.
ONE_TURN_ONLY = {"llama2"}


@pytest.mark.parametrize("name", FAMILIES)
def test_of_an_answer_of_several_turns_the_assistants_text_is_marked(families, name):
    tokenizer, end = families[name], FAMILIES[name].end
    turns = (Message("assistant", "Which one?"), Message("user", "The second."), Message("assistant", "Four."))
    answers = [FirstTurn(turns[0].content)] * 2
    if name in ONE_TURN_ONLY:
        with pytest.raises(UserError, match="differently once others follow"):
            tokenizer.encode_turns((ASKED,), turns, answers=answers)
        return
    ids, written = tokenizer.encode_turns((ASKED,), turns, answers=answers)
    whole = tokenizer.decode([*tokenizer.encode_prompt((ASKED,), answers=answers), *ids])
    assert tokenizer._template.render((ASKED, *turns), False).startswith(whole)
    shown = tokenizer.decode([token for token, mine in zip(ids, written, strict=True) if mine])
    assert "".join(shown.split()) == "".join(f"Which one?{end}Four.{end}".split())
    assert "The second." in tokenizer.decode([token for token, mine in zip(ids, written, strict=True) if not mine])


@pytest.mark.parametrize("name", sorted(KNOW_TOOLS))
def test_a_call_of_a_tool_within_an_answer_is_the_assistants(families, name):
    tokenizer, end = families[name], FAMILIES[name].end
    turns = (*CALLED[1:], Message("assistant", "Two."))
    ids, written = tokenizer.encode_turns((ASKED,), turns, TOOLS, [FirstTurn("")])
    shown = tokenizer.decode([token for token, mine in zip(ids, written, strict=True) if mine])
    others = tokenizer.decode([token for token, mine in zip(ids, written, strict=True) if not mine])
    assert "add_up" in shown and shown.count(end) == 2 and "".join(shown.split()).endswith(f"Two.{end}")
    assert "the sum is 2" in others and "the sum is 2" not in shown and "add_up" not in others.replace("[TOOL_", "")


def test_every_template_here_is_tested():
    assert {path.stem for path in FOLDER.glob("*.jinja")} == {f"{name}_like" for name in FAMILIES}


def test_dates_are_recorded_for_the_families_that_ask_for_one(families):
    dated = {name for name, tokenizer in families.items() if tokenizer.template_inputs}
    assert dated == {"mistral_small", "granite"}
    assert "26 Jul 2024" in families["llama31"].decode(families["llama31"].encode_prompt((ASKED,)))
    assert "2024-07-26" in families["mistral_small"].decode(families["mistral_small"].encode_prompt((ASKED,)))


#: Templates that render an answer differently once turns follow, and those that drop its thoughts then.
NO_FURTHER_TURNS = {"llama2", "qwen3"}
DROP_THOUGHTS = {"deepseek_r1"}


@pytest.mark.parametrize("name", FAMILIES)
def test_further_turns_continue_prompt_and_answer_or_are_refused(families, name):
    require_exact_further_turns(families[name], name in NO_FURTHER_TURNS, name in DROP_THOUGHTS)


def require_exact_further_turns(tokenizer, refused: bool, drops_thoughts: bool) -> None:
    """Further turns continue the ids of prompt and answer, or are refused: always, or where the answer has thoughts."""
    further = (Message("user", "Shorter, without " + " ".join(tokenizer._special.ids)),)
    for messages, answer in ((TURNS, "Four."), ((ASKED,), "  Four.\n"), ((ASKED,), THOUGHTS)):
        answered = (Message("assistant", answer),)
        prompt, (ids,) = tokenizer.encode_pair(messages, [answer])
        if refused or drops_thoughts and answer == THOUGHTS:
            with pytest.raises(UserError, match="differently once others follow"):
                tokenizer.encode_further(messages, answered, further, answers=[answer])
            continue
        found = tokenizer.encode_further(messages, answered, further, answers=[answer])
        whole = tokenizer.encode_prompt([*messages, *answered, *further], answers=[answer])
        assert found[0] == ids[-1] and [*prompt, *ids, *found[1:]] == whole
