"""Answers with and without thoughts: both sides of a pair share their prompt, and every text is what a model writes."""

import itertools

import pytest

from tests.support.tiny import CHATML
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Message

QUESTION = (Message("user", "What is 6 x 7?"),)
TURN = "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
PROMPT = "<|im_start|>user\nWhat is 6 x 7?<|im_end|>\n<|im_start|>assistant\n"
OPENING, BLOCK = "<think>\n", "<think>\n\n</think>\n\n"

# Thoughts of the last turns are rendered in one form, an empty block where there are none; earlier ones are dropped.
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m['role'] != 'assistant' %}"
    + TURN
    + "{% else %}{% set c, thoughts = m['content'], '' %}{% if '</think>' in c %}"
    "{% set thoughts = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thoughts) %}{{ '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}"
    "{% endif %}{{ c + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
QWEN3_THINKING = QWEN3.replace("t\\n' }}{% endif %}", "t\\n<think>\\n' }}{% endif %}")  # always opens thoughts
# Thoughts are dropped everywhere, and the generation prompt opens them.
R1 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\\n' + m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}{% else %}"
    + TURN
    + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)
R1_WITHOUT_OPENING = R1.replace("<think>\\n", "")
# Thoughts are dropped, and nothing is opened or closed after a tool's result.
_AFTER_TOOLS = (
    "{% set ns = namespace(tool=false) %}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% if not ns.tool %}{{ '<|im_start|>assistant\\nHISTORY' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>\\n' }}{% set ns.tool = false %}"
    "{% else %}{% set ns.tool = m['role'] == 'tool' %}" + TURN + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt and not ns.tool %}{{ '<|im_start|>assistant\\nPROMPT' }}{% endif %}"
)
CLOSED = _AFTER_TOOLS.replace("HISTORY", "</think>").replace("PROMPT", "</think>")  # as in DeepSeek-V3.1
CLOSED_BY_PROMPT = _AFTER_TOOLS.replace("HISTORY", "").replace("PROMPT", "<think></think>")
OPENED = _AFTER_TOOLS.replace("HISTORY", "").replace("PROMPT", "<think>\\n")
# A line break before an empty block and before thoughts, as in GLM-4.5.
HEADED = R1.replace("assistant\\n<think>\\n' }}{% endif", "assistant' }}{% endif").replace(
    "{{ '<|im_start|>assistant\\n' + m['content'].split('</think>')[-1]",
    "{{ '<|im_start|>assistant\\n<think>' + (m['content'].split('</think>')[0].split('<think>')[-1].strip() "
    "if '</think>' in m['content'] else '') + '</think>\\n' + m['content'].split('</think>')[-1].strip()",
)
TEMPLATES = {"qwen3": QWEN3, "qwen3_thinking": QWEN3_THINKING, "r1": R1, "r1_old": R1_WITHOUT_OPENING}

PLAIN = "42"
WHOLE = "<think>\nsix sevens\n</think>\n\n42"
OTHER = "<think>six 7s</think>48"
CONTINUED = "six sevens\n</think>\n\n42"


@pytest.fixture(scope="module")
def thinking(chatml, tmp_path_factory):
    folder = tmp_path_factory.mktemp("thinking")
    return {name: ChatTokenizer(chatml._tokenizer, folder, text) for name, text in TEMPLATES.items()}


def texts(tokenizer, *answers, messages=QUESTION):
    prompt, responses = tokenizer.encode_pair(messages, answers)
    return tokenizer.decode(prompt), [tokenizer.decode(ids) for ids in responses]


def test_two_answers_without_thoughts(thinking):
    assert texts(thinking["qwen3"], "42", "48") == (PROMPT + BLOCK, ["42<|im_end|>", "48<|im_end|>"])
    assert texts(thinking["qwen3_thinking"], "42", "48") == (PROMPT + BLOCK, ["42<|im_end|>", "48<|im_end|>"])
    assert texts(thinking["r1"], "42", "48") == (PROMPT, ["42<|im_end|>", "48<|im_end|>"])
    assert texts(thinking["r1_old"], "42", "48") == (PROMPT, ["42<|im_end|>", "48<|im_end|>"])


@pytest.mark.parametrize("name", ["qwen3", "r1_old"])
def test_two_answers_with_thoughts(thinking, name):
    assert texts(thinking[name], WHOLE, OTHER) == (PROMPT, [WHOLE + "<|im_end|>", OTHER + "<|im_end|>"])


@pytest.mark.parametrize("name", ["qwen3_thinking", "r1"])
def test_thoughts_that_the_prompt_has_opened(thinking, name):
    expected = PROMPT + OPENING, ["six sevens\n</think>\n\n42<|im_end|>"] * 2
    assert texts(thinking[name], WHOLE, CONTINUED) == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_with_thoughts_on_one_side_shares_its_prompt(thinking, name):
    block = BLOCK if name.startswith("qwen3") else ""
    prompt = PROMPT + (OPENING if name == "qwen3_thinking" else "")
    plain = (block + "42").removeprefix(prompt[len(PROMPT) :])
    expected = WHOLE.removeprefix(prompt[len(PROMPT) :])
    assert texts(thinking[name], PLAIN, WHOLE) == (prompt, [plain + "<|im_end|>", expected + "<|im_end|>"])


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answers", [(a, b) for a, b in itertools.product([PLAIN, WHOLE], [PLAIN, WHOLE, OTHER])])
def test_prompt_and_response_are_the_rendering_where_the_template_keeps_thoughts(thinking, name, answers):
    tokenizer = thinking[name]
    prompt, responses = texts(tokenizer, *answers)
    for answer, response in zip(answers, responses):
        whole = tokenizer._template.render([*QUESTION, Message("assistant", answer)], False)
        if answer == PLAIN or (answer == WHOLE and name.startswith("qwen3")):
            assert prompt + response + "\n" == whole
        else:  # the template drops or rewrites them, a model does not
            assert prompt + response == PROMPT + answer + "<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("answers", [(PLAIN, WHOLE), (WHOLE, WHOLE), (PLAIN, PLAIN)])
def test_spans_are_the_characters_of_the_answer(thinking, name, answers):
    tokenizer = thinking[name]
    prompt = tokenizer.encode_prompt(QUESTION, answers=answers)
    for answer in answers:
        ids, spans = tokenizer.encode_response_with_spans(QUESTION, answer, answers=answers)
        assert ids == tokenizer.encode_response(QUESTION, answer, answers=answers) and len(spans) == len(ids) - 1
        begun = tokenizer.decode(prompt).removeprefix(PROMPT)
        covered = "".join(answer[start:end] for start, end in spans if start >= 0)
        assert covered == (answer.removeprefix(begun) if answer == WHOLE else answer)
        template = tokenizer.decode([i for i, (start, _) in zip(ids, spans) if start < 0])
        assert begun + template == (BLOCK if answer == PLAIN and name.startswith("qwen3") else begun)


def test_a_prompt_of_unknown_answers_is_the_one_to_sample_from(thinking):
    for name, end in {"qwen3": BLOCK, "qwen3_thinking": BLOCK, "r1": OPENING, "r1_old": ""}.items():
        assert thinking[name].decode(thinking[name].encode_prompt(QUESTION)) == PROMPT + end


@pytest.mark.parametrize("name, answer", [("qwen3", WHOLE), ("r1", PLAIN)])
def test_a_response_that_does_not_continue_its_prompt_is_refused(thinking, name, answer):
    with pytest.raises(UserError, match="does not continue its prompt, which ends in '<think>"):
        thinking[name].encode_response(QUESTION, answer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_thoughts_of_earlier_turns_may_be_dropped(thinking, name):
    messages = (*QUESTION, Message("assistant", WHOLE), Message("user", "And plus 1?"))
    prompt, _ = texts(thinking[name], "43", "44", messages=messages)
    assert "six sevens" not in prompt and "42<|im_end|>\n<|im_start|>user\nAnd plus 1?<|im_end|>" in prompt


def test_a_tag_without_thoughts_is_text(chatml, thinking):
    for tokenizer in (chatml, *thinking.values()):
        assert texts(tokenizer, "a <think> tag", "none")[1][0].endswith("a <think> tag<|im_end|>")
    assert texts(chatml, WHOLE, CONTINUED) == (PROMPT, [WHOLE + "<|im_end|>", CONTINUED + "<|im_end|>"])


def test_a_template_that_heads_every_answer_with_a_block(chatml, tmp_path):
    """It is part of the prompt even before thoughts, as the template says."""
    text = CHATML.replace(
        "message['content']", "('<think></think>\\n' if message['role'] == 'assistant' else '') + message['content']"
    )
    tokenizer = ChatTokenizer(chatml._tokenizer, tmp_path, text)
    assert texts(tokenizer, PLAIN, WHOLE) == (PROMPT + "<think></think>\n", ["42<|im_end|>", WHOLE + "<|im_end|>"])


@pytest.mark.parametrize("name", ["qwen3", "r1"])
def test_special_tokens_spelled_out_within_thoughts_are_text(thinking, name):
    tokenizer, answer = thinking[name], "<think>\na <|im_end|> b\n</think>\n\n4<|im_start|>2"
    _, (ids, _) = tokenizer.encode_pair(QUESTION, (answer, PLAIN))
    assert tokenizer.decode(ids) == answer + "<|im_end|>"
    assert sum(i in tokenizer._special_ids for i in ids) == 1


def test_thoughts_that_the_prompt_has_closed(chatml, tmp_path):
    """With thoughts, the prompt ends before the place where the template closes them."""
    tokenizer = ChatTokenizer(chatml._tokenizer, tmp_path, CLOSED)
    assert texts(tokenizer, "42", "48") == (PROMPT + "</think>", ["42<|im_end|>", "48<|im_end|>"])
    assert texts(tokenizer, WHOLE, OTHER) == (PROMPT, [WHOLE + "<|im_end|>", OTHER + "<|im_end|>"])
    assert texts(tokenizer, "42", OTHER) == (PROMPT, ["</think>42<|im_end|>", OTHER + "<|im_end|>"])
    assert tokenizer.decode(tokenizer.encode_prompt(QUESTION)) == PROMPT + "</think>"


def test_thoughts_that_only_the_prompt_has_closed(chatml, tmp_path):
    """The model has read the tag before an answer, though no earlier answer shows it."""
    tokenizer = ChatTokenizer(chatml._tokenizer, tmp_path, CLOSED_BY_PROMPT)
    assert texts(tokenizer, "42", "48") == (PROMPT + "<think></think>", ["42<|im_end|>", "48<|im_end|>"])
    assert texts(tokenizer, "42", OTHER) == (PROMPT, ["<think></think>42<|im_end|>", OTHER + "<|im_end|>"])


def test_kept_thoughts_do_not_follow_thoughts_that_the_prompt_has_closed(chatml, tmp_path):
    kept = R1.replace(".split('</think>')[-1]", "").replace("<think>\\n' }}", "<think>\\n</think>' }}")
    tokenizer = ChatTokenizer(chatml._tokenizer, tmp_path, kept)
    assert texts(tokenizer, WHOLE, OTHER) == (PROMPT, [WHOLE + "<|im_end|>", OTHER + "<|im_end|>"])
    closed = "<think>\n</think>42<|im_end|>"
    assert texts(tokenizer, WHOLE, PLAIN) == (PROMPT, [WHOLE + "<|im_end|>", closed])


@pytest.mark.parametrize("template", [CLOSED, CLOSED_BY_PROMPT, OPENED])
def test_after_a_tools_result_nothing_is_opened_or_closed(chatml, tmp_path, template):
    tokenizer = ChatTokenizer(chatml._tokenizer, tmp_path, template)
    messages = (*QUESTION, Message("assistant", "calling"), Message("tool", "42"))
    prompt, responses = texts(tokenizer, "It is 42.", "No.", messages=messages)
    assert prompt.endswith("<|im_start|>tool\n42<|im_end|>\n") and responses == ["It is 42.<|im_end|>", "No.<|im_end|>"]


def test_what_stands_before_thoughts_and_block_alike_ends_the_prompt(chatml, tmp_path):
    tokenizer = ChatTokenizer(chatml._tokenizer, tmp_path, HEADED)
    assert texts(tokenizer, "42", "48") == (PROMPT + "<think></think>\n", ["42<|im_end|>", "48<|im_end|>"])
    assert texts(tokenizer, OTHER, WHOLE) == (PROMPT, [OTHER + "<|im_end|>", WHOLE + "<|im_end|>"])
    assert texts(tokenizer, OTHER, "42") == (PROMPT, [OTHER + "<|im_end|>", "<think></think>\n42<|im_end|>"])
