"""Chat tokenizer: conversations to token ids, with the exact boundary between prompt and response.

Text is tokenized once; all later steps use ids, so the boundary cannot move. A training sequence is the prompt's ids
followed by the response's. The prompt is what the model's chat template renders up to the start of the assistant's
text; the response is that text and one end-of-turn token.
"""

import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from treg_megatron.errors import UserError
from treg_megatron.tokenizer.conversation import Message, Sampled
from treg_megatron.tokenizer.fast_tokenizer import FastEngine, tokenizer_hash
from treg_megatron.tokenizer.model_folder import existing_folder, require_embeddings
from treg_megatron.tokenizer.sentencepiece_model import SentencePieceTokenizer
from treg_megatron.tokenizer.special_tokens import SpecialTokens, replaced
from treg_megatron.utils.files import read_json
from treg_megatron.utils.imports import heavy_imports

# Llama 3.2's template puts today's date into the system turn unless given one; labels must not depend on it.
_FIXED_DATE = "26 Jul 2024"
_PROBE = "response"
_REMEMBERED = 64
_PROBE_SYSTEM = "instruction"


class ChatTokenizer:
    """A tokenizer together with its chat template. Made by :func:`load_tokenizer`.

    Attributes:
        folder: where the tokenizer was loaded from.
        sha256: hash of everything that determines the ids of a text: vocabulary, merges, normalisation,
            pre-tokenization and added tokens. Saving and loading, padding, truncation and automatic BOS/EOS do not
            change it.
        template_sha256: hash of the chat template's text.
        vocab_size: number of ids, added tokens included.
    """

    def __init__(self, tokenizer: Any, folder: Path):
        self.folder = folder
        self._tokenizer = tokenizer
        self._engine = tokenizer if isinstance(tokenizer, SentencePieceTokenizer) else FastEngine(tokenizer)
        self._special = SpecialTokens(tokenizer)
        self._special_ids = set(self._special.ids.values())
        self._puts_space_first = tokenizer.convert_ids_to_tokens(self._encode(_PROBE))[0].startswith("\u2581")
        self.sha256 = tokenizer.sha256 if self._engine is tokenizer else tokenizer_hash(tokenizer)
        self._template, self._template_tokens = tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map)
        self.template_sha256 = hashlib.sha256(self._template.encode()).hexdigest()
        self.vocab_size = len(tokenizer)
        self._last_prompt: tuple[Any, str] = (None, "")
        self._ends_of_turn: dict[str, int] = {}
        self._before_response = ""
        self._knows_system = True
        self._knows_system = self._probe_system_role()
        self._before_response = self._probe_text_before_response()
        self._last_prompt = (None, "")

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that ends with a user turn, up to the start of the assistant's text.

        Special tokens come only from the template, so BOS is never doubled, and text in the conversation that looks
        like a special token is encoded as ordinary text. If the template has no system role, the system message is
        prepended to the first user turn.

        Raises:
            UserError: the template rejects the conversation (for instance roles that do not alternate).
        """
        disguise = self._special.disguise(message.content for message in messages)
        text = self._rendered_prompt(messages, disguise)
        if not disguise:
            return self._encode(text)
        ids: list[int] = []
        for i, part in enumerate(self._special.place.split(text)):
            if i % 2:
                ids.append(self._special.ids.get(part, self._special.ids.get(part.strip())))
            elif part:
                ids += self._encode_within(replaced(part, {hidden: shown for shown, hidden in disguise.items()}))
        return ids

    def encode_response(self, messages: Sequence[Message], response: str) -> list[int]:
        """Ids of ``response`` as the template renders it after ``messages``, and exactly one end-of-turn token.

        If the template strips the response, so do the ids. Text in the response that looks like a special token is
        encoded as ordinary text. Whatever the template puts after the end-of-turn token is left out.

        Raises:
            UserError: the template rejects the conversation, rewrites the response, or does not end it with a special
                token.
        """
        words, _, end_of_turn = self._split_response(messages, response)
        return [*self._encode(words, special=False), end_of_turn]

    def encode_response_with_spans(self, messages: Sequence[Message], response: str) -> tuple[list[int], np.ndarray]:
        """:meth:`encode_response`, and the character span in ``response`` of each id except the end-of-turn token.

        Spans are int64 [tokens, 2]: start and end (exclusive). Tokens that are bytes of one character share it;
        characters that no token covers, such as a space, belong to the next token.
        """
        words, shift, end_of_turn = self._split_response(messages, response)
        ids, spans = self._engine.encode_with_spans(words)
        starts, ends = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
        reached = np.concatenate([[0], np.maximum.accumulate(ends)])[:-1]
        spans = np.column_stack([np.minimum(starts, reached), ends])
        return [*ids, end_of_turn], np.maximum(spans + shift, 0)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @functools.cached_property
    def end_of_turn(self) -> int:
        """The token that ends a response."""
        return self.encode_response([Message("user", "prompt")], _PROBE)[-1]

    def sampled(self, ids: Sequence[int]) -> Sampled:
        """A response from generated ids, which may have padding after the end-of-turn token."""
        ids = list(ids)
        finished = self.end_of_turn in ids
        ids = ids[: ids.index(self.end_of_turn) + 1] if finished else ids
        words = ids[:-1] if finished else ids
        text = self._tokenizer.decode(words, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Sampled(text, ids, finished)

    def _split_response(self, messages: Sequence[Message], response: str) -> tuple[str, int, int]:
        """Text to encode, offset of its first character in ``response`` (-1: before it), and end-of-turn id."""
        disguise = self._special.disguise([*(message.content for message in messages), response])
        prompt = self._rendered_prompt(messages, disguise)
        whole = self._render([*messages, Message("assistant", response)], False, disguise)
        if not whole.startswith(prompt):
            raise UserError(
                f"the chat template of {self.folder} renders a prompt differently once a response follows: "
                "no exact boundary between them exists"
            )
        rest = whole[len(prompt) :]
        for words in (response, response.rstrip(), response.lstrip(), response.strip()):
            space = " " * (_leading_spaces(rest) - _leading_spaces(words))
            rendered = space + replaced(words, disguise)
            if rest.startswith(rendered):
                end_of_turn = self._first_special(rest[len(rendered) :])
                cut = len(response) - len(response.lstrip()) if len(words) < len(response.rstrip()) else 0
                if self._puts_space_first:
                    return words, cut, end_of_turn
                return space + words, cut - len(space), end_of_turn
        raise UserError(f"the chat template of {self.folder} rewrites the response {_shortened(response)!r}")

    def _rendered_prompt(self, messages: Sequence[Message], disguise: Mapping[str, str]) -> str:
        key = (tuple(messages), tuple(disguise.items()))
        if self._last_prompt[0] != key:  # requested again for each response
            self._last_prompt = key, self._render(messages, True, disguise) + self._before_response
        return self._last_prompt[1]

    def _first_special(self, text: str) -> int:
        if text not in self._ends_of_turn:
            if len(self._ends_of_turn) > _REMEMBERED:
                self._ends_of_turn.clear()
            self._ends_of_turn[text] = self._find_first_special(text)
        return self._ends_of_turn[text]

    def _find_first_special(self, text: str) -> int:
        for token in self._encode(text):
            if token in self._special_ids:
                return token
        raise UserError(f"the chat template of {self.folder} does not end a response with a special token")

    def _probe_text_before_response(self) -> str:
        """Text between the template's generation prompt and the response, such as an empty thinking block.

        A lone space belongs to the response: a model that continues the prompt generates it.
        """
        question = [Message("user", "prompt")]
        prompt = self._render(question, True)
        whole = self._render([*question, Message("assistant", _PROBE)], False)
        before, found, _ = whole[len(prompt) :].partition(_PROBE)
        if not whole.startswith(prompt) or not found:
            raise UserError(f"the chat template of {self.folder} does not render a response after its prompt")
        return before if before.strip(" ") else ""

    def _probe_system_role(self) -> bool:
        try:
            return _PROBE in self._render([Message("system", _PROBE), Message("user", "prompt")], True)
        except UserError:
            return False

    def _render(self, messages: Sequence[Message], generation_prompt: bool, disguise: Mapping[str, str] = {}) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self._knows_system and len(messages) > 1 and messages[0].role == "system":
            system, first, *others = messages
            messages = [Message(first.role, f"{system.content}\n\n{first.content}"), *others]
        try:
            (text,), _ = render_jinja_template(
                [[{"role": m.role, "content": replaced(m.content, disguise)} for m in messages]],
                chat_template=self._template,
                add_generation_prompt=generation_prompt,
                date_string=_FIXED_DATE,
                **self._template_tokens,
            )
            return text
        except (TemplateError, TypeError) as error:
            raise UserError(
                f"the chat template of {self.folder} rejects a conversation of "
                f"{', '.join(m.role for m in messages)}: {error}"
            ) from None

    def _encode(self, text: str, special: bool = True) -> list[int]:
        return self._engine.encode(text, special)

    def _encode_within(self, text: str) -> list[int]:
        """Ids of a text between special tokens, none of it recognised as one."""
        if not self._puts_space_first:
            return self._encode(text, special=False)
        # The tokenizer prepends a space to what it takes for the start of a text. A line break is a separate token, so
        # what follows one is encoded as in mid-text.
        before, ids = self._encode("\n", special=False), self._encode("\n" + text, special=False)
        return ids[len(before) :] if ids[: len(before)] == before else self._encode(text, special=False)


def load_tokenizer(folder: str | Path) -> ChatTokenizer:
    """Load a tokenizer and its chat template from this machine; nothing is downloaded or executed.

    Args:
        folder: a Hugging Face folder with a fast tokenizer; or a SentencePiece ``.model`` file, or a folder with
            ``tokenizer.model`` and no Hugging Face tokenizer, with ``chat_template.jinja`` in the same folder.

    Raises:
        UserError: the folder is missing, has no such tokenizer or no chat template, or its config.json is of a model
            with fewer embeddings than the tokenizer has ids.
    """
    folder = Path(folder).expanduser()
    tokenizer = _loaded(folder if folder.is_file() else existing_folder(folder, "tokenizer folder"))
    beside = folder / "config.json"
    vocabulary = read_json(beside).get("vocab_size") if beside.is_file() else None
    if isinstance(vocabulary, int):
        require_embeddings(tokenizer.vocab_size, vocabulary, folder)
    return tokenizer


def _loaded(folder: Path) -> ChatTokenizer:
    if folder.is_file():
        return ChatTokenizer(SentencePieceTokenizer(folder), folder)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        if (folder / "tokenizer.model").is_file():
            return ChatTokenizer(SentencePieceTokenizer(folder / "tokenizer.model"), folder)
        raise UserError(f"{folder} holds no tokenizer (tokenizer.json, tokenizer_config.json or tokenizer.model)")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # we encode one text at a time
    with heavy_imports():
        from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the tokenizer of {folder} cannot be loaded: {error}") from None
    if not tokenizer.is_fast:
        raise UserError(f"{folder} holds a slow tokenizer; save it as a fast one (tokenizer.json) first")
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {folder} has no chat template; use the instruction-tuned model's tokenizer")
    return ChatTokenizer(tokenizer, folder)


def _leading_spaces(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
