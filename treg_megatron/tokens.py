"""Text to token ids, once: after this only ids travel, so that no boundary can move.

A trained sequence is the ids of the prompt followed by the ids of the response. The prompt is what the model's chat
template renders up to where the assistant's words begin; the response is those words and one end-of-turn token.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treg_megatron.errors import UserError
from treg_megatron.files import sha256_of_json
from treg_megatron.pairs import Message

# Llama 3.2's template writes today's date into the system turn unless it is given one; labels must not change with it.
_FIXED_DATE = "26 Jul 2024"
_PROBE = "response"


class ChatTokenizer:
    """A tokenizer together with its chat template. Made by :func:`load_tokenizer`.

    Attributes:
        sha256: hash of what decides the ids of a text: vocabulary, merges, normalisation, splitting, added tokens.
            Saving and loading, padding, truncation and automatic BOS/EOS leave it unchanged.
        template_sha256: hash of the chat template's text.
        vocab_size: number of ids, added tokens included.
    """

    def __init__(self, tokenizer: Any, folder: Path):
        self.folder = folder
        self._tokenizer = tokenizer
        self._special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._puts_space_first = tokenizer.convert_ids_to_tokens(self._encode(_PROBE))[0].startswith("\u2581")
        self.sha256 = _tokenizer_hash(tokenizer)
        self.template_sha256 = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()
        self.vocab_size = len(tokenizer)
        self._before_response = ""
        self._before_response = self._probe_text_before_response()

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that ends with a user turn, up to where the assistant's words begin.

        Special tokens come from the template alone, so BOS is never doubled.

        Raises:
            UserError: the template refuses the conversation (for instance a system message where it knows none).
        """
        return self._encode(self._render(messages, generation_prompt=True) + self._before_response)

    def encode_response(self, messages: Sequence[Message], response: str) -> list[int]:
        """Ids of ``response`` as the template renders it after ``messages``, and exactly one end-of-turn token.

        Some templates strip the response, and then so do the ids. Words of the response that look like a special token
        are encoded as ordinary text. What the template puts after the end-of-turn token belongs to nobody.

        Raises:
            UserError: the template refuses the conversation, rewrites the response, or ends it with no special token.
        """
        words, end_of_turn = self._split_response(messages, response)
        return [*self._encode(words, special=False), end_of_turn]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _split_response(self, messages: Sequence[Message], response: str) -> tuple[str, int]:
        prompt = self._render(messages, generation_prompt=True) + self._before_response
        whole = self._render([*messages, Message("assistant", response)], generation_prompt=False)
        if not whole.startswith(prompt):
            raise UserError(f"the chat template of {self.folder} renders a prompt differently once a response follows: "
                            "no exact boundary between them exists")
        rest = whole[len(prompt):]
        space = rest[:len(rest) - len(rest.lstrip(" "))] if not response.startswith(" ") else ""
        for words in (response, response.rstrip(), response.lstrip(), response.strip()):
            if rest.startswith(space + words):
                end_of_turn = self._first_special(rest[len(space + words):])
                return (words if self._puts_space_first else space + words), end_of_turn
        raise UserError(f"the chat template of {self.folder} rewrites the response {_shortened(response)!r}")

    def _first_special(self, text: str) -> int:
        for token in self._encode(text):
            if token in self._special_ids:
                return token
        raise UserError(f"the chat template of {self.folder} ends a response with no special token")

    def _probe_text_before_response(self) -> str:
        """What the template writes between its generation prompt and the response, such as an empty block of thoughts.

        A space alone belongs to the response: a model that continues the prompt generates it.
        """
        question = [Message("user", "prompt")]
        prompt = self._render(question, generation_prompt=True)
        whole = self._render([*question, Message("assistant", _PROBE)], generation_prompt=False)
        before, found, _ = whole[len(prompt):].partition(_PROBE)
        if not whole.startswith(prompt) or not found:
            raise UserError(f"the chat template of {self.folder} does not render a response after its prompt")
        return before if before.strip(" ") else ""

    def _render(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._tokenizer.apply_chat_template([m._asdict() for m in messages], tokenize=False,
                                                       add_generation_prompt=generation_prompt,
                                                       date_string=_FIXED_DATE)
        except (TemplateError, TypeError) as error:
            raise UserError(f"the chat template of {self.folder} refuses a conversation of "
                            f"{', '.join(m.role for m in messages)}: {error}") from None

    def _encode(self, text: str, special: bool = True) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special).input_ids


def load_tokenizer(folder: str | Path) -> ChatTokenizer:
    """Load the fast tokenizer and the chat template of a local Hugging Face folder; nothing is downloaded or executed.

    Raises:
        UserError: the folder is missing, or has no fast tokenizer or no chat template.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"tokenizer folder {folder} does not exist")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise UserError(f"{folder} holds no tokenizer (tokenizer.json, tokenizer_config.json)")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")       # we encode one text at a time
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the tokenizer of {folder} does not load: {error}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder} holds a slow tokenizer; save it as a fast one (tokenizer.json) first")
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {folder} has no chat template; take the instruction-tuned model's tokenizer")
    return ChatTokenizer(tokenizer, folder)


def _tokenizer_hash(tokenizer: Any) -> str:
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    return sha256_of_json({name: parts[name] for name in ("model", "normalizer", "pre_tokenizer", "added_tokens")})


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
