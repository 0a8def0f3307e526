"""The unit tests' tokenizers: what is damaged here is what those tests write."""

from tests.unit.conftest import chatml, tokenizer_folders, tokenizers  # noqa: F401 -- fixtures
