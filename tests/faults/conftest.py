"""The unit tests' models and tokenizers, for tests that take too long to be unit tests."""

from tests.unit.conftest import chatml, tiny_folder, tokenizer_folders, tokenizers  # noqa: F401 -- fixtures
