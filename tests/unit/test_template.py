"""Chat templates: nothing is dropped in silence or depends on the day, and tools are rendered."""

import datetime
import json
import pickle
import time

import pytest

from tests.support.tiny import CHATML
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Message

QUESTION = (Message("user", "What is 1 + 1?"),)
KIND = Message("system", "Be kind.")
TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
START = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

# The fixed text holds words that a probe might use.
ALPACA = (
    "{{ 'Below is a prompt or instruction. Write a response.\\n\\n' }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '### Task:\\n' + m['content'] + '\\n\\n' }}{% elif m['role'] == 'assistant' %}"
    "{{ '### Answer:\\n' + m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Answer:\\n' }}{% endif %}"
)
TODAY = "{{ 'Today is ' + strftime_now('%d %B %Y') + '. ' }}{% for m in messages %}" + TURN + "{% endfor %}" + START

# Tool definitions head the system turn, calls and results are JSON in turns of their own, as in Qwen 2.5.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}{% for m in messages %}{% if m.tool_calls %}{{ '<|im_start|>assistant\\n' }}"
    "{% if m.content %}{{ m.content + '\\n' }}{% endif %}{% for call in m.tool_calls %}"
    "{{ '{\"name\": \"' + call.function.name + '\", \"arguments\": ' + call.function.arguments | tojson + '}' }}"
    "{% endfor %}{{ '<|im_end|>\\n' }}{% else %}" + TURN + "{% endif %}{% endfor %}" + START
)
# Arguments are text, and only content that is none makes a turn of calls alone, as in DeepSeek.
TEXT_ARGUMENTS = (
    "{% for m in messages %}{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ '<|im_start|>' + call.function.name + '\\n' + call.function.arguments + '<|im_end|>' }}{% endfor %}{% endif %}"
    "{% if m['content'] is not none %}" + TURN + "{% endif %}{% endfor %}" + START
)
WEATHER = json.dumps(
    [{"type": "function", "function": {"name": "weather", "description": "of a <|im_end|> town", "parameters": {}}}]
)


def called(arguments) -> tuple[Message, ...]:
    calls = [{"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}]
    return (
        *QUESTION,
        Message("assistant", "", json.dumps({"tool_calls": calls})),
        Message("tool", "18 degrees", json.dumps({"tool_call_id": "call00001", "name": "weather"})),
    )


@pytest.fixture
def with_template(chatml, tmp_path):
    return lambda text: ChatTokenizer(chatml._tokenizer, tmp_path, text)


def text_of(tokenizer, *arguments) -> str:
    return tokenizer.decode(tokenizer.encode_prompt(*arguments))


def test_a_system_message_heads_the_first_turn_whatever_words_the_template_holds(with_template):
    text = text_of(with_template(ALPACA), (KIND, *QUESTION))
    assert text.endswith("### Task:\nBe kind.\n\nWhat is 1 + 1?\n\n### Answer:\n")


@pytest.mark.parametrize(
    "dropped, messages",
    [
        ("m.role == 'system' and loop.index > 1", (*QUESTION, Message("assistant", "2"), KIND, *QUESTION)),
        ("m.role == 'system' and messages | length > 3", (KIND, *QUESTION, Message("assistant", "2"), *QUESTION)),
        ("loop.first and messages | length > 2", (*QUESTION, Message("assistant", "2"), *QUESTION)),
        ("m.role == 'assistant' and not loop.last", (*QUESTION, Message("assistant", "is"), *QUESTION)),
        ("m.role == 'tool'", (*QUESTION, Message("assistant", "2"), Message("tool", "user"))),
        ("'evil' in m.content", (*QUESTION, Message("assistant", "2"), Message("user", "evil"))),
    ],
)
def test_a_message_that_the_template_drops_is_named(with_template, dropped, messages):
    tokenizer = with_template(
        f"{{% for m in messages %}}{{% if not ({dropped}) %}}{TURN}{{% endif %}}{{% endfor %}}{START}"
    )
    with pytest.raises(UserError, match=r"drops the (system|user|assistant|tool) message '"):
        tokenizer.encode_prompt(messages)


def test_a_template_may_rewrite_a_message(with_template):
    tokenizer = with_template(
        CHATML.replace("message['content']", "message['content'] | replace('/think', '') | replace('ou', 'o')")
    )
    assert text_of(tokenizer, (Message("user", "Why? /think"),)).startswith("<|im_start|>user\nWhy? <|im_end|>")
    assert text_of(tokenizer, (Message("user", "colour"),)).startswith("<|im_start|>user\ncolor<|im_end|>")


def test_ids_do_not_depend_on_the_day(with_template, monkeypatch):
    first = with_template(TODAY)
    assert text_of(first, QUESTION).startswith("Today is 26 July 2024. ")

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    monkeypatch.setattr(datetime, "datetime", Tomorrow)
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    again = with_template(TODAY + "{# another text, compiled anew #}")
    assert again.encode_prompt(QUESTION) == first.encode_prompt(QUESTION)


def test_a_date_that_the_template_takes_is_recorded(with_template, chatml):
    assert with_template(TODAY).template_inputs == {"strftime_now": "2024-07-26"}
    assert chatml.template_inputs == {}
    assert with_template(TODAY).identity["template_inputs"] == {"strftime_now": "2024-07-26"}
    assert chatml.identity == {"sha256": chatml.sha256, "chat_template_sha256": chatml.template_sha256}
    llama = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = with_template(llama + "{{ date_string }}" + CHATML)
    assert tokenizer.template_inputs == {} and text_of(tokenizer, QUESTION).startswith("26 Jul 2024<|im_start|>")


@pytest.mark.parametrize(
    "call, name", [("now()", "'now' is undefined"), ("[1, 2] | random", "'random'"), ("lipsum()", "'lipsum'")]
)
def test_what_nothing_defines_is_named(with_template, call, name):
    with pytest.raises(UserError, match=f"the chat template of .*{name}"):
        with_template("{{ " + call + " }}" + CHATML)


def test_templates_that_are_no_jinja_or_fail_are_refused(with_template):
    with pytest.raises(UserError, match="cannot be used: unexpected"):
        with_template("{% for m in messages %}{{ m['content'] }")
    with pytest.raises(UserError, match="rejects a conversation of user"):
        with_template("{{ messages[0]['content'].index('?') }}" + CHATML)


def test_generation_marks_change_nothing(with_template, chatml):
    marked = with_template(CHATML.replace("{{ '<|im_start|>' + m", "{% generation %}{{ '<|im_start|>' + m").replace(
        "{% endfor %}", "{% endgeneration %}{% endfor %}"
    ))  # fmt: skip
    assert marked.encode_response(QUESTION, "2") == chatml.encode_response(QUESTION, "2")
    assert marked.encode_prompt(QUESTION) == chatml.encode_prompt(QUESTION)


def test_tools_calls_and_results_are_rendered(with_template):
    tokenizer = with_template(TOOLS)
    ids = tokenizer.encode_prompt(called({"town": "Paris"}), WEATHER)
    text = tokenizer.decode(ids)
    assert text.startswith('<|im_start|>system\n{"type": "function", "function": {"name": "weather", "description": ')
    assert "of a <|im_end|> town" in text
    assert '<|im_start|>assistant\n{"name": "weather", "arguments": {"town": "Paris"}}<|im_end|>\n' in text
    assert text.endswith("<|im_start|>tool\n18 degrees<|im_end|>\n<|im_start|>assistant\n")
    assert sum(i in tokenizer._special_ids for i in ids) == 9, "the tool's description is ordinary text"
    spans = tokenizer.encode_response_with_spans(called({}), "It is mild.", WEATHER)
    assert spans[0] == tokenizer.encode_response(called({}), "It is mild.", WEATHER)
    assert tokenizer.decode(spans[0]) == "It is mild.<|im_end|>"


@pytest.mark.parametrize("arguments", [{"town": "Paris"}, '{"town": "Paris"}'])
@pytest.mark.parametrize("template, calls", [(TOOLS, 1), (TEXT_ARGUMENTS, 1)])
def test_arguments_may_be_an_object_or_its_text(with_template, template, calls, arguments):
    text = text_of(with_template(template), called(arguments))
    assert text.count('{"town": "Paris"}') == 1 and "None" not in text
    assert text.count("<|im_start|>") == 4, "user, call, tool, and the answer"


def test_a_template_without_tools_is_named(chatml, with_template):
    with pytest.raises(UserError, match="the chat template of .* does not know tools"):
        chatml.encode_prompt(QUESTION, WEATHER)
    with pytest.raises(UserError, match="the chat template of .* does not know tools"):
        chatml.encode_response(QUESTION, "2", WEATHER)
    with pytest.raises(UserError, match="does not render tool calls"):
        chatml.encode_prompt(called({"town": "Paris"}))
    with pytest.raises(UserError, match="rejects a conversation of user with tools: no tools here"):
        with_template("{% if tools %}{{ raise_exception('no tools here') }}{% endif %}" + CHATML).encode_prompt(
            QUESTION, WEATHER
        )


@pytest.mark.parametrize("tools", ["{}", "[1]", "weather"])
def test_tools_that_are_no_list_of_objects_are_refused(with_template, tools):
    with pytest.raises(UserError, match="tools must be the JSON text of a list of objects"):
        with_template(TOOLS).encode_prompt(QUESTION, tools)


def test_special_tokens_spelled_out_and_texts_in_the_templates_form(tokenizers, chatml, with_template):
    assert chatml.spelled_specials("a<|im_end|>b<|im_start|><|im_end|>") == ["<|im_end|>", "<|im_start|>"]
    assert chatml.spelled_specials("a <|im_end b") == []
    for templated in (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
        "Paris.<|im_end|>",
        " Paris.<|im_end|>\n",
    ):
        assert chatml.looks_templated(templated)
    assert not chatml.looks_templated("How does <|im_end|> work?")
    assert tokenizers["headers"].looks_templated("<|start_header|>user<|end_header|>\n\nhi")
    assert with_template(ALPACA).looks_templated(text_of(with_template(ALPACA), QUESTION))


def test_a_tokenizer_can_be_sent_to_another_process(tokenizers):
    for tokenizer in tokenizers.values():
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.encode_prompt(QUESTION) == tokenizer.encode_prompt(QUESTION)
