"""How responses are drawn from a model, and where they end."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from treg_megatron.tokenizer.chat import ChatTokenizer
from treg_megatron.tokenizer.conversation import Sampled


class Decoding(NamedTuple):
    """The distribution that responses are drawn from, and what ends one besides the end-of-turn token.

    Attributes:
        temperature: 0 is greedy decoding.
        top_p: probability mass to sample from, in (0, 1].
        max_new_tokens: a response is cut off there.
        stop_tokens: ids of further tokens that end a response.
        stop_strings: texts that end a response, and are no part of it.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    stop_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def response(self, tokenizer: ChatTokenizer, ids: Sequence[int]) -> Sampled:
        """A response from generated ids, which may have padding by the end-of-turn token after what ended it."""
        sampled = tokenizer.sampled(ids, self.stop_tokens)
        ends = [place for text in self.stop_strings if (place := sampled.text.find(text)) >= 0]
        if not ends:
            return sampled
        assert sampled.ids is not None
        return Sampled(sampled.text[: min(ends)], sampled.ids[: len(sampled.ids) - sampled.finished], True)


def seed_from(key: str) -> int:
    """A seed, in [0, 2^31), that ``key`` decides."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little") >> 1
