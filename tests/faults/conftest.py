"""The models and tokenizers of the unit tests, for tests that take longer than those may."""

from tests.unit.conftest import chatml, tiny_folder, tokenizer_folders, tokenizers  # noqa: F401 -- fixtures
