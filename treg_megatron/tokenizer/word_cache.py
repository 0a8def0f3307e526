"""Token-id cache keyed by pre-token: repeated words are looked up instead of being encoded again.

A byte-level tokenizer splits text by a regular expression, and no token crosses a split. The ids of a text are
therefore the concatenated ids of its parts if it is divided only at such points. The points used here,

    before a single space that has no white space on either side,
    between an ASCII letter or digit and ASCII punctuation or a line break,

are splits of every expression of :data:`_EXPRESSIONS`, whatever the context. Apostrophes (``it's``) and the characters
of added tokens such as ``<|im_end|>`` are never split points. Other kinds of tokenizers have no cache and encode every
text whole.
"""

import json
import re
import string
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

# The pre-tokenization of Llama 3 and of Qwen 2 to 3; GPT-2's expression is built into the stage ByteLevel.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
_EXPRESSIONS = {_WORDS % "{1,3}", _WORDS % ""}

_MOST = 1 << 17  # cached parts, each of at most _LONGEST characters: about 30 MB
_LONGEST = 48
_SPACE_BYTE = "\u0120"  # the byte-level encoding of a space; ASCII letters encode as themselves


class Cuts(NamedTuple):
    """How a tokenizer's text may be divided.

    Attributes:
        parts: matches the parts of a text; concatenated, they are the text.
        word_model: maps a word of ASCII letters, optionally preceded by :data:`_SPACE_BYTE`, to its tokens; None if
            these do not depend on the tokenizer's model alone.
    """

    parts: re.Pattern[str]
    word_model: Callable[[str], list[Any]] | None


class TokenCache:
    """Caching encoder for tokenizers with :func:`known_cuts`.

    Args:
        encode: maps a text, on its own, to an encoding with ``ids`` and ``offsets``.
        cuts: how the text may be divided.
    """

    def __init__(self, encode: Callable[[str], Any], cuts: Cuts):
        self._parts, self._known = cuts.parts, _Known(encode, cuts.word_model)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._table(self._found(self._parts.findall(text)))[:, 0].tolist()

    def encode_with_spans(self, text: str) -> tuple[list[int], np.ndarray]:
        """Ids of a text and the character span of each, int64 [tokens, 2]: start and end (exclusive)."""
        parts = self._parts.findall(text)
        found = self._found(parts)
        table = self._table(found)
        sizes = np.fromiter(map(len, parts), np.int64, len(parts))
        tokens = np.fromiter(map(len, found), np.int64, len(found)) // table.strides[0]
        return table[:, 0].tolist(), table[:, 1:] + np.repeat(sizes.cumsum() - sizes, tokens)[:, None]

    def _found(self, parts: list[str]) -> list[bytes]:
        if len(self._known) > _MOST:
            self._known.clear()
        return list(map(self._known.__getitem__, parts))

    @staticmethod
    def _table(found: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(found), dtype=np.intc).reshape(-1, 3)


class _Known(dict[str, bytes]):
    """Parts and their tokens: id, first character and end (exclusive) of each, as the bytes of C ints."""

    def __init__(self, encode: Callable[[str], Any], word_model: Callable[[str], list[Any]] | None):
        self._encode, self._word_model = encode, word_model

    def __missing__(self, part: str) -> bytes:
        tokens = (self._tokens_of_word(part) or self._tokens_of(part)).tobytes()
        if len(part) <= _LONGEST:
            self[part] = tokens
        return tokens

    def _tokens_of(self, part: str) -> array:
        encoded, tokens = self._encode(part), array("i")
        for token, (start, end) in zip(encoded.ids, encoded.offsets, strict=True):
            tokens.extend((token, start, end))
        return tokens

    def _tokens_of_word(self, part: str) -> array | None:
        """Tokens of a word, optionally after a space; None for other parts. Most parts are such words, and calling the
        model directly takes half the time."""
        word = part.removeprefix(" ")
        if self._word_model is None or not (word.isascii() and word.isalpha()):
            return None
        tokens, end = array("i"), 0
        for token in self._word_model(word if len(word) == len(part) else _SPACE_BYTE + word):
            start, end = end, end + len(token.value)
            tokens.extend((token.id, start, end))
        return tokens if end == len(part) else None  # None: the vocabulary lacks a letter


def known_cuts(backend: Any) -> Cuts | None:
    """How text may be divided for a tokenizer of the package ``tokenizers``; None if it is not of a known kind."""
    settings = json.loads(backend.to_str())
    stage, model = settings["pre_tokenizer"] or {}, settings["model"]
    stages = stage["pretokenizers"] if stage.get("type") == "Sequence" else [stage]
    added = [token["content"] for token in settings["added_tokens"]]
    spelled = set("".join(added))
    if not (
        all(_is_known(stage) for stage in stages)
        and any(map(_cuts, stages))
        and (settings["normalizer"] or {"type": "NFC"})["type"] == "NFC"
        and not model.get("dropout")
        and not any(token[side] for token in settings["added_tokens"] for side in ("lstrip", "rstrip", "single_word"))
        and not any(map(str.isspace, spelled))
    ):
        return None
    after_word = "".join(map(re.escape, sorted(set(string.punctuation + "\n") - {"'"} - spelled)))
    parts = re.compile(
        rf" ?[A-Za-z0-9]+(?=[{after_word}]| \S|\Z)"  # most words
        rf"|.+?(?:(?<=\S)(?= \S)|(?<=[A-Za-z0-9])(?=[{after_word}])|\Z)",
        re.DOTALL,
    )
    model_alone = (
        model["type"] == "BPE"
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and any(stage.get("type") == "ByteLevel" for stage in stages)
        and not any(token.isascii() and token.isalpha() for token in added)
    )
    return Cuts(parts, backend.model.tokenize if model_alone else None)


def _is_known(stage: dict[str, Any]) -> bool:
    if stage.get("type") == "ByteLevel":
        return not stage["add_prefix_space"]
    return stage.get("type") == "Digits" or _cuts(stage)


def _cuts(stage: dict[str, Any]) -> bool:
    if stage.get("type") == "Split":
        return stage["pattern"].get("Regex") in _EXPRESSIONS and stage["behavior"] == "Isolated" and not stage["invert"]
    return stage.get("type") == "ByteLevel" and stage["use_regex"]
