"""A turn of a conversation, and a response that a model sampled."""

from typing import NamedTuple


class Message(NamedTuple):
    """One turn: ``role`` is system, user or assistant."""

    role: str
    content: str


class Sampled(NamedTuple):
    """A response.

    Attributes:
        text: its words, without special tokens.
        ids: the sampled token ids, with the end-of-turn token where the model ended its turn; None where the engine
            does not tell them.
        finished: False for a response that was cut off.
    """

    text: str
    ids: list[int] | None
    finished: bool
