"""Ids of a text, part by part: a word that came before is looked up instead of being encoded again.

A byte-level tokenizer cuts text where a regular expression says, and no token crosses a cut. So the ids of a text are
those of its parts in a row, wherever it is divided at such places. The places that are used here,

    before a single space that has no white space on either side,
    between an ASCII letter or digit and ASCII punctuation or a line break,

are cut at by each of the expressions of :data:`_EXPRESSIONS`, whatever stands around them. Apostrophes are left alone
(``it's``), and so are the characters that added tokens such as ``<|im_end|>`` are spelled with. Tokenizers of other
kinds have no memory and encode every text whole.
"""

import array
import itertools
import json
import re
import string
from collections.abc import Callable
from typing import Any

import numpy as np

# What Llama 3 and Qwen 2 to 3 cut text with; GPT-2's expression is built into the stage ByteLevel.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|" \
         r"\s*[\r\n]+|\s+(?!\S)|\s+"
_EXPRESSIONS = {_WORDS % "{1,3}", _WORDS % ""}

_MOST = 1 << 17               # parts that are remembered, of at most so many characters: some 30 MB
_LONGEST = 48


class WordMemory:
    """Encodes texts that a tokenizer's :func:`parts_expression` divides.

    Args:
        encode: a text to something with ``ids`` and ``offsets``, without regard for what stands around it.
        parts: finds the parts of a text; in a row they are the text.
    """

    def __init__(self, encode: Callable[[str], Any], parts: re.Pattern[str]):
        self._parts, self._known = parts, _Known(encode)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._table(map(self._known.__getitem__, self._parts.findall(text)))[:, 0].tolist()

    def encode_with_spans(self, text: str) -> tuple[list[int], np.ndarray]:
        """Ids of a text and the characters of each, int [tokens, 2]: the first, and one after the last."""
        parts = self._parts.findall(text)
        found = [self._known[part] for part in parts]
        table = self._table(found)
        starts = np.cumsum([0, *map(len, parts)])[:-1]
        tokens = np.array([len(each) for each in found], dtype=np.int64) // table.strides[0]
        return table[:, 0].tolist(), table[:, 1:] + np.repeat(starts, tokens)[:, None]

    @staticmethod
    def _table(found) -> np.ndarray:
        return np.frombuffer(b"".join(found), dtype=np.intc).reshape(-1, 3)


class _Known(dict):
    """Part of a text -> for each token its id, first character, and one after the last, as the bytes of C ints."""

    def __init__(self, encode: Callable[[str], Any]):
        self._encode = encode

    def __missing__(self, part: str) -> bytes:
        encoded = self._encode(part)
        found = array.array("i", itertools.chain.from_iterable(
            (token, *span) for token, span in zip(encoded.ids, encoded.offsets))).tobytes()
        if len(part) <= _LONGEST:
            if len(self) >= _MOST:
                self.clear()
            self[part] = found
        return found


def parts_expression(backend: Any) -> re.Pattern[str] | None:
    """What finds the parts of a text for a tokenizer of the package ``tokenizers``; None if it has no known cuts."""
    settings = json.loads(backend.to_str())
    stage = settings["pre_tokenizer"] or {}
    stages = stage["pretokenizers"] if stage.get("type") == "Sequence" else [stage]
    added = settings["added_tokens"]
    spelled = {character for token in added for character in token["content"]}
    if not (all(_is_known(stage) for stage in stages) and any(map(_cuts, stages))
            and (settings["normalizer"] or {"type": "NFC"})["type"] == "NFC"
            and not settings["model"].get("dropout")
            and not any(token[side] for token in added for side in ("lstrip", "rstrip", "single_word"))
            and not any(map(str.isspace, spelled))):
        return None
    after_word = "".join(map(re.escape, sorted(set(string.punctuation + "\n") - {"'"} - spelled)))
    return re.compile(rf" ?[A-Za-z0-9]+(?=[{after_word}]| \S|\Z)"                               # most words
                      rf"|.+?(?:(?<=\S)(?= \S)|(?<=[A-Za-z0-9])(?=[{after_word}])|\Z)", re.DOTALL)


def _is_known(stage: dict[str, Any]) -> bool:
    if stage.get("type") == "ByteLevel":
        return not stage["add_prefix_space"]
    return stage.get("type") == "Digits" or _cuts(stage)


def _cuts(stage: dict[str, Any]) -> bool:
    if stage.get("type") == "Split":
        return stage["pattern"].get("Regex") in _EXPRESSIONS and stage["behavior"] == "Isolated" and not stage["invert"]
    return stage.get("type") == "ByteLevel" and stage["use_regex"]
