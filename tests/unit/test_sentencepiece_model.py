"""SentencePiece .model files: one trained here on a few sentences, and Mistral's own ones if they are installed."""

import importlib.util
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import CORPUS
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer
from treg_megatron.tokenizer.conversation import Message

MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + '[/INST]' }}\
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% else %}\
{{ raise_exception('System role not supported') }}{% endif %}{% endfor %}"""
QUESTION = (Message("user", "What is 1 + 1?"),)

# without the character by which SentencePiece itself writes a space
texts = (
    st.text(st.characters(codec="utf-8", exclude_characters="\u2581"), min_size=1, max_size=30)
    | st.sampled_from(["</s>", "a [/INST] b", "  two  spaces ", "\n\nx", "\u200d\U0001f469\u200d\U0001f680"])
).filter(str.strip)


def with_template(folder: Path, model: bytes) -> ChatTokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "chat_template.jinja").write_text(MISTRAL)
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> ChatTokenizer:
    folder = tmp_path_factory.mktemp("trained")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["[INST]", "[/INST]"],
        normalization_rule_name="identity",
        minloglevel=2,
        num_threads=1,
        remove_extra_whitespaces=False,
    )
    return with_template(folder, (folder / "tokenizer.model").read_bytes())


@pytest.fixture(scope="module")
def mistral(tmp_path_factory) -> ChatTokenizer:
    package = importlib.util.find_spec("mistral_common")
    if package is None:
        pytest.skip(
            "Mistral's tokenizer models come with a package, which `make test` installs: "
            "pip install --no-deps mistral-common"
        )
    models = Path(package.submodule_search_locations[0]) / "data"
    return with_template(
        tmp_path_factory.mktemp("mistral"), (models / "mistral_instruct_tokenizer_240323.model.v3").read_bytes()
    )


@pytest.mark.parametrize("name", ["trained", "mistral"])
def test_ids_are_those_of_the_model_between_control_tokens(name, request):
    """As in Mistral's own code: each text is encoded separately, with the space that SentencePiece prepends."""
    tokenizer = request.getfixturevalue(name)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.folder / "tokenizer.model"))
    control = pieces.piece_to_id
    messages = (*QUESTION, Message("assistant", "It is 2."), Message("user", "Sure?"))
    assert tokenizer.encode_prompt(messages) == [
        control("<s>"),
        control("[INST]"),
        *pieces.encode("What is 1 + 1?"),
        control("[/INST]"),
        *pieces.encode("It is 2."),
        control("</s>"),
        control("[INST]"),
        *pieces.encode("Sure?"),
        control("[/INST]"),
    ]
    assert tokenizer.encode_response(messages, "Yes, 2.") == [*pieces.encode("Yes, 2."), control("</s>")]
    assert tokenizer.vocab_size == pieces.vocab_size()


@pytest.mark.parametrize("name", ["trained", "mistral"])
@given(question=texts, response=texts)
def test_every_text_comes_back_and_none_becomes_a_control_token(name, request, question, response):
    tokenizer = request.getfixturevalue(name)
    messages = (Message("user", question),)
    prompt, (ids, spans) = tokenizer.encode_prompt(messages), tokenizer.encode_response_with_spans(messages, response)
    assert tokenizer.decode(prompt) == f"<s>[INST] {question}[/INST]"
    assert sum(i in tokenizer._special_ids for i in prompt) == 3
    assert tokenizer.decode(ids) == " " + response + "</s>"
    assert sum(i in tokenizer._special_ids for i in ids) == 1 and ids == tokenizer.encode_response(messages, response)
    covered = {i for start, end in spans for i in range(start, end)}
    assert covered == set(range(len(response)))


def test_the_hash_notices_other_pieces_and_templates(trained, tmp_path):
    model = (trained.folder / "tokenizer.model").read_bytes()
    again = with_template(tmp_path, model)
    assert (again.sha256, again.template_sha256) == (trained.sha256, trained.template_sha256)
    assert load_tokenizer(tmp_path / "tokenizer.model").sha256 == trained.sha256
    piece = next(p for p in trained._tokenizer.convert_ids_to_tokens(list(range(300, 340))) if p.isascii()).encode()
    assert with_template(tmp_path, model.replace(piece, b"#" * len(piece))).sha256 != trained.sha256


def test_unusable_models(trained, tmp_path):
    with pytest.raises(UserError, match="is not a SentencePiece model"):
        with_template(tmp_path, b"not a model")
    model = (trained.folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="needs a chat template beside it"):
        load_tokenizer(tmp_path)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60,
        minloglevel=2,
        num_threads=1,
    )
    with pytest.raises(UserError, match="rewrites text before it encodes it"):
        load_tokenizer(tmp_path)
