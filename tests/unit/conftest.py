"""Models and tokenizers shared by the unit tests, built once per session; nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

from tests.support.tiny import TEMPLATES, tiny_llama, tiny_tokenizer  # noqa: E402
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer  # noqa: E402

# No deadline: a busy machine must not cause failures. Few examples: these tests run at every change. In CI always the
# same ones: a change must not fail because of an unlucky draw in unrelated code.
settings.register_profile("unit", deadline=None, max_examples=30, derandomize="CI" in os.environ)
settings.load_profile("unit")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A Hugging Face folder with a random Llama and the ChatML tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_llama(folder, vocab=tiny_tokenizer(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    """Tokenizer folders, keyed by the name of their chat template."""
    folders = {template: tmp_path_factory.mktemp(template) for template in TEMPLATES}
    for template, folder in folders.items():
        tiny_tokenizer(folder, template=template)
    return folders


@pytest.fixture(scope="session")
def tokenizers(tokenizer_folders) -> dict[str, ChatTokenizer]:
    """Loaded tokenizers, keyed by the name of their chat template."""
    return {template: load_tokenizer(folder) for template, folder in tokenizer_folders.items()}


@pytest.fixture(scope="session")
def chatml(tokenizers) -> ChatTokenizer:
    return tokenizers["chatml"]
