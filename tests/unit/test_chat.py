"""The boundary between prompt and response, the end-of-turn token, and what the hashes detect."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import CHATML, HEADERS, TEMPLATES
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer
from treg_megatron.tokenizer.conversation import Message

QUESTION = (Message("user", "What is 1 + 1?"),)
PROMPTS = {
    "chatml": "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n",
    "headers": "<|bos|><|start_header|>user<|end_header|>\n\nWhat is 1 + 1?<|eot|>"
    "<|start_header|>assistant<|end_header|>\n\n",
    "turns": "<bos><start_of_turn>user\nWhat is 1 + 1?<end_of_turn>\n<start_of_turn>model\n",
}
END_OF_TURN = {"chatml": "<|im_end|>", "headers": "<|eot|>", "turns": "<end_of_turn>"}

texts = st.text(st.characters(codec="utf-8"), max_size=40) | st.sampled_from(
    [
        "<|im_end|>",
        "a<|eot|>b",
        "<end_of_turn>",
        "\n\nx",
        " x ",
        "\u200d\U0001f469\u200d\U0001f680",
        "x\n<|im_start|>user\n",
    ]
)


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_ends_where_the_assistant_begins(tokenizers, template):
    tokenizer = tokenizers[template]
    assert tokenizer.decode(tokenizer.encode_prompt(QUESTION)) == PROMPTS[template]


@pytest.mark.parametrize("template", TEMPLATES)
def test_response_is_its_text_and_one_end_of_turn(tokenizers, template):
    tokenizer = tokenizers[template]
    assert tokenizer.decode(tokenizer.encode_response(QUESTION, "It is 2.")) == "It is 2." + END_OF_TURN[template]


@pytest.mark.parametrize("template", TEMPLATES)
@given(question=texts.filter(str.strip), response=texts.filter(str.strip))
def test_response_ids_decode_to_the_response(tokenizers, template, question, response):
    tokenizer = tokenizers[template]
    ids = tokenizer.encode_response((Message("user", question),), response)
    rendered = response if template == "chatml" else response.strip()
    assert tokenizer.decode(ids[:-1]) == rendered
    assert tokenizer.decode(ids[-1:]) == END_OF_TURN[template]
    special = tokenizer._special_ids
    assert sum(i in special for i in ids) == 1


@pytest.mark.parametrize("template", TEMPLATES)
@given(question=texts.filter(str.strip), response=texts.filter(str.strip))
def test_no_words_of_a_conversation_become_special_tokens(tokenizers, template, question, response):
    tokenizer = tokenizers[template]
    messages = (Message("user", question), Message("assistant", response), Message("user", question))
    plain = tuple(message._replace(content="x") for message in messages)
    ids, usual = tokenizer.encode_prompt(messages), tokenizer.encode_prompt(plain)
    assert [i for i in ids if i in tokenizer._special_ids] == [i for i in usual if i in tokenizer._special_ids]
    assert tokenizer.decode(ids) == tokenizer._template.render(messages, True)


@pytest.mark.parametrize("template", TEMPLATES)
@given(response=texts.filter(str.strip))
def test_spans_are_the_characters_of_each_token(tokenizers, template, response):
    tokenizer = tokenizers[template]
    ids, spans = tokenizer.encode_response_with_spans(QUESTION, response)
    assert ids == tokenizer.encode_response(QUESTION, response) and len(spans) == len(ids) - 1
    covered = sorted({i for start, end in spans for i in range(start, end)})
    kept = response if template == "chatml" else response.strip()
    assert covered == list(range(response.index(kept), response.index(kept) + len(kept)))
    for token, (start, end) in zip(ids, spans):
        if "\ufffd" not in (text := tokenizer.decode([token])):
            assert response[start:end] == text


@pytest.mark.parametrize("template", TEMPLATES)
def test_conversations_keep_all_their_turns(tokenizers, template):
    messages = (*QUESTION, Message("assistant", "2"), Message("user", "And 2 + 2?"))
    text = tokenizers[template].decode(tokenizers[template].encode_prompt(messages))
    assert text.startswith(PROMPTS[template] + "2" + END_OF_TURN[template])
    assert "And 2 + 2?" in text


def test_a_conversation_that_the_template_rejects_is_a_user_error(tokenizers):
    with pytest.raises(UserError, match="rejects a conversation of user, user: Conversation roles must alternate"):
        tokenizers["turns"].encode_prompt((*QUESTION, *QUESTION))


@pytest.mark.parametrize("system", ["", "{% if message['role'] == 'system' %}{% continue %}{% endif %}"])
def test_without_a_system_role_its_message_is_prepended_to_the_first_turn(tokenizers, chatml, tmp_path, system):
    """The template may reject a system message or ignore it."""
    tokenizer = tokenizers["turns"]
    if system:
        tokenizer = changed(
            chatml, tmp_path, CHATML.replace("%}{{ '<|im_start|>' + m", "%}" + system + "{{ '<|im_start|>' + m", 1)
        )
    folded = tokenizer.encode_prompt((Message("user", "Be kind.\n\n" + QUESTION[0].content),))
    assert tokenizer.encode_prompt((Message("system", "Be kind."), *QUESTION)) == folded


def changed(tokenizer: ChatTokenizer, folder, chat_template: str) -> ChatTokenizer:
    tokenizer._tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template)
    return load_tokenizer(folder)


def test_text_between_generation_prompt_and_response_belongs_to_the_prompt(chatml, tmp_path):
    thinking = CHATML.replace(
        "message['content']",
        "('<think></think>\\n' if loop.last and message['role'] == 'assistant' else '') + message['content']",
    )
    tokenizer = changed(chatml, tmp_path, thinking)
    assert tokenizer.decode(tokenizer.encode_prompt(QUESTION)) == PROMPTS["chatml"] + "<think></think>\n"
    assert tokenizer.decode(tokenizer.encode_response(QUESTION, "2")) == "2<|im_end|>"


def test_a_space_before_the_response_belongs_to_the_response(chatml, tmp_path):
    bracketed = (
        "{% for m in messages %}{{ ' ' + m['content'] + '<|im_end|>' if m['role'] == 'assistant' "
        "else '[' + m['content'] + ']' }}{% endfor %}"
    )
    tokenizer = changed(chatml, tmp_path, bracketed)
    assert tokenizer.decode(tokenizer.encode_prompt(QUESTION)) == "[What is 1 + 1?]"
    assert tokenizer.decode(tokenizer.encode_response(QUESTION, "2")) == " 2<|im_end|>"


@pytest.mark.parametrize(
    "template, message",
    [
        (CHATML.replace("<|im_end|>", ""), "does not end a response with a special token"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "does not render a response"),
        (CHATML.replace("message['content']", "message['content'] | replace('evil', 'good')"), "rewrites the response"),
        (CHATML.replace("{% for", "{{ messages | length }}{% for"), "does not render a response"),
    ],
)
def test_templates_without_an_exact_boundary_are_refused(chatml, tmp_path, template, message):
    with pytest.raises(UserError, match=message):
        changed(chatml, tmp_path, template).encode_response(QUESTION, "an evil 2")


def test_hash_survives_saving_padding_truncation_and_bos_settings(chatml, tokenizer_folders, tmp_path):
    copy = load_tokenizer(tokenizer_folders["chatml"])
    copy._tokenizer("a b c", truncation=True, max_length=2, padding="max_length")
    copy._tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert ChatTokenizer(copy._tokenizer, tmp_path).sha256 == again.sha256 == chatml.sha256
    assert again.template_sha256 == chatml.template_sha256


def test_hash_detects_other_ids_and_other_templates(chatml, tokenizers, tmp_path):
    assert len({tokenizer.sha256 for tokenizer in tokenizers.values()}) == len(tokenizers)
    chatml._tokenizer.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = content["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).sha256 != chatml.sha256
    assert load_tokenizer(tmp_path).template_sha256 == chatml.template_sha256
    assert changed(chatml, tmp_path, HEADERS).template_sha256 == tokenizers["headers"].template_sha256


def test_unusable_folders(chatml, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    chatml._tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
