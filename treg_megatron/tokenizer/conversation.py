"""Conversation turns and sampled responses."""

import json
from typing import Any, NamedTuple


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: system, user, assistant or tool.
        content: the turn's text.
        extra: further fields that a chat template may read (``tool_calls``, ``tool_call_id``, ``name``,
            ``reasoning_content``), as the text of a JSON object; empty if there are none.
    """

    role: str
    content: str
    extra: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.extra) if self.extra else {})}

    def as_list(self) -> list[str]:
        """Role and content, then ``extra`` where there is any: what the hash of a pair is made of."""
        return [*self[:2], *([self.extra] if self.extra else [])]


class FirstTurn(str):
    """The text of the first assistant turn of an answer of several, which other turns follow."""


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
