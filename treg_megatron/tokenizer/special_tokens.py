"""Special tokens, and texts in which they are spelled out as ordinary characters."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


class SpecialTokens:
    """The special tokens of a tokenizer.

    Attributes:
        ids: id of each by its text.
        place: matches one of them together with the white space that it swallows, as a group.
    """

    def __init__(self, tokenizer: Any):
        tokens = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.ids = {token.content: i for i, token in tokens.items()}
        longest_first = sorted(tokens.values(), key=lambda token: len(token.content), reverse=True)
        self._spelled = re.compile("|".join(re.escape(token.content) for token in longest_first) or r"(?!)")
        self.place = re.compile(
            "("
            + "|".join(
                r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip for token in longest_first
            )
            + ")"
            if tokens
            else r"((?!))"
        )

    def spelled(self, text: str) -> list[str]:
        """Texts of the special tokens that are spelled out in a text, each once, in the order of their appearance."""
        return list(dict.fromkeys(self._spelled.findall(text)))

    def disguise(self, texts: Iterable[str]) -> dict[str, str]:
        """A private-use character per special token spelled out in texts, to tell it from the template's own."""
        text = "\0".join(texts)
        spelled = sorted(set(self._spelled.findall(text)))
        unused = (chr(code) for code in range(0x10FFFD, 0xF0000, -1) if chr(code) not in text) if spelled else ()
        return dict(zip(spelled, unused, strict=False))


def replaced(text: str, by: Mapping[str, str]) -> str:
    """``text`` with each key of ``by`` replaced by its value, longer keys first."""
    if not by:
        return text
    longest_first = sorted(by, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, longest_first)), lambda match: by[match[0]], text)


def replaced_in(value: Any, by: Mapping[str, str]) -> Any:
    """A JSON value with :func:`replaced` applied to every text in it, keys included."""
    if not by:
        return value
    if isinstance(value, str):
        return replaced(value, by)
    if isinstance(value, list):
        return [replaced_in(item, by) for item in value]
    if isinstance(value, dict):
        return {replaced(key, by): replaced_in(item, by) for key, item in value.items()}
    return value


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
