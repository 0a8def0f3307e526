"""Which chat template of a folder is used: one, several by name, or that of an older multimodal folder."""

import json

import pytest

from tests.support.tiny import CHATML
from treg_megatron.errors import UserError
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.tokenizer.conversation import Message

QUESTION = (Message("user", "Why?"),)
OTHER = "rag: " + CHATML


@pytest.fixture
def folder(chatml, tmp_path):
    """A tokenizer's folder without a chat template."""
    chatml._tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    return tmp_path


def in_config(folder, templates):
    path = folder / "tokenizer_config.json"
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": listed}))


def in_files(folder, templates):
    (folder / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (folder / path).write_text(text)


@pytest.mark.parametrize("put", [in_config, in_files])
def test_named_templates(folder, chatml, put):
    put(folder, {"default": CHATML, "rag": OTHER})
    assert load_tokenizer(folder).template_sha256 == chatml.template_sha256
    assert load_tokenizer(folder, template="default").template_sha256 == chatml.template_sha256
    rag = load_tokenizer(folder, template="rag")
    assert rag.decode(rag.encode_prompt(QUESTION)).startswith("rag: <|im_start|>user\n")
    assert (rag.identity["chat_template"], rag.template) == ("rag", OTHER)
    assert "chat_template" not in load_tokenizer(folder, template="default").identity
    with pytest.raises(UserError, match="has no chat template named tool_use, only default, rag"):
        load_tokenizer(folder, template="tool_use")


@pytest.mark.parametrize("put", [in_config, in_files])
def test_named_templates_without_a_default_are_named(folder, chatml, put):
    put(folder, {"tool_use": CHATML, "rag": OTHER})
    with pytest.raises(UserError, match="several chat templates and none is the default: rag, tool_use; name one"):
        load_tokenizer(folder)
    assert load_tokenizer(folder, template="tool_use").template_sha256 == chatml.template_sha256
    (folder / "chat_template.jinja").write_text(CHATML)  # what the message says
    assert load_tokenizer(folder).template_sha256 == chatml.template_sha256


@pytest.mark.parametrize("content", [CHATML, {"default": CHATML}, [{"name": "default", "template": CHATML}]])
def test_the_template_of_an_older_multimodal_folder(folder, chatml, content):
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": content}))
    assert load_tokenizer(folder).template_sha256 == chatml.template_sha256


@pytest.mark.parametrize("content", ["{}", '{"chat_template": 1}', '{"chat_template": {}}'])
def test_an_older_file_without_a_template_is_named(folder, content):
    (folder / "chat_template.json").write_text(content)
    with pytest.raises(UserError, match=r"chat_template\.json holds no chat template"):
        load_tokenizer(folder)


def test_a_folder_without_a_template_and_one_without_names(folder, chatml, tokenizer_folders):
    with pytest.raises(UserError, match="has no chat template; use the instruction-tuned model's tokenizer"):
        load_tokenizer(folder)
    with pytest.raises(UserError, match="has no chat template named rag, only default"):
        load_tokenizer(tokenizer_folders["chatml"], template="rag")
