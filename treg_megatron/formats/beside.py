"""Columns that any format may have beside its own: a system message, earlier turns, functions to call."""

from typing import Any

from treg_megatron.formats.fields import text
from treg_megatron.formats.messages import as_messages, is_messages
from treg_megatron.formats.pair_format import Answered, PairFormat
from treg_megatron.formats.tools import tools_text
from treg_megatron.tokenizer.conversation import Message

SYSTEM = ("system", "system_prompt", "system_message")
HISTORY = ("history",)
TOOLS = ("tools",)
NAMES = (*SYSTEM, *HISTORY, *TOOLS)


def with_columns_beside(answered: Answered, row: dict, format: PairFormat) -> Answered:
    """What a format read, with the record's system message, history and tools added.

    Raises:
        ValueError: one of them is of another type, or contradicts the conversation.
    """
    for name in HISTORY:
        if row.get(name) and not format.uses(name):
            earlier = _turns(row[name], name)
            if answered.messages[: len(earlier)] != earlier:
                start = 1 if answered.messages[0].role == "system" else 0
                messages = (*answered.messages[:start], *earlier, *answered.messages[start:])
                answered = answered._replace(messages=messages)
    for name in SYSTEM:
        if row.get(name) and not format.uses(name) and text(row[name], name).strip():
            system = Message("system", row[name])
            if not answered.messages or answered.messages[0].role != "system":
                answered = answered._replace(messages=(system, *answered.messages))
            elif answered.messages[0] != system:
                raise ValueError(f"{name} is not the system message that the conversation begins with")
    for name in TOOLS:
        if row.get(name) and not format.uses(name):
            tools = tools_text(row[name], name)
            if answered.tools and tools and tools != answered.tools:
                raise ValueError(f"{name} is not the list of functions that the conversation has")
            answered = answered._replace(tools=tools or answered.tools)
    return answered


def _turns(value: Any, name: str) -> tuple[Message, ...]:
    """Earlier turns: messages, or pairs of a user's and an assistant's text, as LLaMA-Factory has them."""
    if is_messages(value):
        return as_messages(value, name)
    if not isinstance(value, list) or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value):
        raise ValueError(f"{name} must be a list of messages, or of pairs of a user's and an assistant's text")
    return tuple(
        Message(role, text(content, name))
        for pair in value
        for role, content in zip(("user", "assistant"), pair, strict=True)
    )
