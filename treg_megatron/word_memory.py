"""Ids of a text, part by part: a word that came before is looked up instead of being encoded again.

A byte-level tokenizer cuts text where a regular expression says, and no token crosses a cut. So the ids of a text are
those of its parts in a row, wherever it is divided at such places. The places that are used here,

    before a single space that has no white space on either side,
    between an ASCII letter or digit and ASCII punctuation or a line break,

are cut at by each of the expressions of :data:`_EXPRESSIONS`, whatever stands around them. Apostrophes are left alone
(``it's``), and so are the characters that added tokens such as ``<|im_end|>`` are spelled with. Tokenizers of other
kinds have no memory and encode every text whole.
"""

import itertools
import json
import re
import string
from collections.abc import Callable, Iterator
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
        encode: a list of texts to something with ``ids``, and for each id its ``offsets`` in its text and in
            ``word_ids`` which text that is; every text without regard for what stands around it.
        parts: finds the parts of a text; in a row they are the text.
    """

    def __init__(self, encode: Callable[[list[str]], Any], parts: re.Pattern[str]):
        self._encode, self._parts = encode, parts
        self._known: dict[str, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return self._table(self._found(self._parts.findall(text)))[:, 0].tolist()

    def encode_with_spans(self, text: str) -> tuple[list[int], np.ndarray]:
        """Ids of a text and the characters of each, int [tokens, 2]: the first, and one after the last."""
        parts = self._parts.findall(text)
        found = self._found(parts)
        table = self._table(found)
        sizes = np.fromiter(map(len, parts), np.int64, len(parts))
        tokens = np.fromiter(map(len, found), np.int64, len(found)) // table.strides[0]
        return table[:, 0].tolist(), table[:, 1:] + np.repeat(sizes.cumsum() - sizes, tokens)[:, None]

    def _found(self, parts: list[str]) -> list[bytes]:
        """For each part its tokens: id, first character, and one after the last, as the bytes of C ints."""
        if len(self._known) > _MOST:
            self._known.clear()
        new = list(set(parts).difference(self._known))
        if new:
            self._known.update(zip(new, self._tokens_of(new)))
        found = list(map(self._known.__getitem__, parts))
        for part in new:
            if len(part) > _LONGEST:
                del self._known[part]
        return found

    def _tokens_of(self, parts: list[str]) -> Iterator[bytes]:
        encoded = self._encode(parts)
        table = np.empty((len(encoded.ids), 3), dtype=np.intc)
        table[:, 0] = encoded.ids
        table[:, 1:] = np.fromiter(itertools.chain.from_iterable(encoded.offsets), np.intc).reshape(-1, 2)
        ends = np.bincount(encoded.word_ids, minlength=len(parts)).cumsum() * table.strides[0]
        rows = table.tobytes()
        return (rows[start:end] for start, end in itertools.pairwise([0, *ends.tolist()]))

    @staticmethod
    def _table(found: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(found), dtype=np.intc).reshape(-1, 3)


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
