"""Conversation turns and sampled responses."""

from typing import NamedTuple


class Message(NamedTuple):
    """One turn: ``role`` is system, user or assistant."""

    role: str
    content: str


class Sampled(NamedTuple):
    """A response sampled from a model.

    Attributes:
        text: decoded text, without special tokens.
        ids: the sampled token ids, with the end-of-turn token if the model ended its turn; None if the engine does
            not return them.
        finished: False for a truncated response.
    """

    text: str
    ids: list[int] | None
    finished: bool
