"""Conversations in the notations in use: OpenAI's role and content, ShareGPT's from and value, HH's text of turns."""

import json
import re
from typing import Any

from treg_megatron.formats.pair_format import Answer
from treg_megatron.tokenizer.conversation import Message

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}

_NOTATIONS = (("role", "content"), ("from", "value"))
_PASSED_ON = ("tool_calls", "tool_call_id", "name", "reasoning_content")
_NOT_TEXT = ("image", "audio", "video", "file")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_HH_MARKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant): ?")
_HEADED_MARKER = re.compile(r"(?:\A\s*|\n+)### (Human|Assistant): ?")
_HH_BEGINNING = re.compile(r"\s*(?:### )?Human:")


def is_conversation(value: Any) -> bool:
    """Whether a value is a conversation of two turns or more, as a list or as its JSON text."""
    value = parsed(value)
    return isinstance(value, list) and len(value) > 1 and all(map(_is_message, value))


def is_messages(value: Any) -> bool:
    """Whether a value is one message, or a list of them, or the JSON text of either."""
    value = parsed(value)
    return _is_message(value) or (isinstance(value, list) and bool(value) and all(map(_is_message, value)))


def parsed(value: Any) -> Any:
    """Messages in place of their JSON text, and of a struct of lists as ``datasets`` stores them; else the value."""
    if isinstance(value, str) and value.lstrip()[:2] in ("[{", '{"'):
        try:
            inside = json.loads(value)
        except (ValueError, RecursionError):
            return value
        as_list = inside if isinstance(inside, list) else [inside]
        return inside if as_list and all(map(_is_message, as_list)) else value
    if isinstance(value, dict) and any(isinstance(value.get(content), list) for _, content in _NOTATIONS):
        columns = {name: column for name, column in value.items() if isinstance(column, list)}
        if len({len(column) for column in columns.values()}) == 1 and columns:
            turned = [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
            return turned if turned and all(map(_is_message, turned)) else value
    return value


def as_messages(value: Any, name: str) -> tuple[Message, ...]:
    """The turns of a value: a list of messages, one message, or the JSON text of either.

    Raises:
        ValueError: it is something else, has an unknown role, or carries what is not text.
    """
    value = parsed(value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of messages, got {type(value).__name__}")
    return tuple(_message(message, name) for message in value)


def answer_of(turns: tuple[Message, ...], name: str) -> Answer:
    """The answer that some turns are: the text of a single one, else the turns.

    Raises:
        ValueError: they do not begin and end with the assistant's, or have reasoning outside of their content.
    """
    if not turns or turns[-1].role != "assistant":
        raise ValueError(f"{name} must end with an assistant turn")
    if turns[0].role != "assistant":
        raise ValueError(f"the answer in {name} must begin with an assistant turn, not the {turns[0].role}'s")
    for turn in turns:
        if "reasoning_content" in (json.loads(turn.extra) if turn.extra else {}):
            raise ValueError(
                f"the answer in {name} has reasoning_content beside its content: write it into content as the model "
                "writes it"
            )
    return turns[0].content if len(turns) == 1 and not turns[0].extra else turns


def parted(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[tuple[Message, ...], Answer, Answer]:
    """Two conversations as what they have in common, and the two answers where they part.

    Raises:
        ValueError: they part at another's turn than the assistant's.
    """
    together = 0
    while together < min(len(chosen), len(rejected)) and chosen[together] == rejected[together]:
        together += 1
    if together == len(chosen) == len(rejected):  # the same answer: the last assistant turns
        together -= 1
    ends = [turns[together] if together < len(turns) else None for turns in (chosen, rejected)]
    if any(end is None or end.role != "assistant" for end in ends):
        if len(chosen) == len(rejected) == together + 1:
            for side, turns in (("chosen", chosen), ("rejected", rejected)):
                answer_of(turns[together:], side)
        raise ValueError("chosen and rejected must be the same conversation up to a turn of the assistant")
    return chosen[:together], answer_of(chosen[together:], "chosen"), answer_of(rejected[together:], "rejected")


def turns_of_text(text: str, name: str) -> tuple[Message, ...]:
    """The turns of a text with ``Human:`` and ``Assistant:`` markers, as HH has them.

    Raises:
        ValueError: text stands before the first marker.
    """
    marker = _HEADED_MARKER if text.lstrip().startswith("### ") else _HH_MARKER
    before, *turns = marker.split(text)
    if before.strip():
        raise ValueError(f"{name} has text before its first turn")
    return tuple(Message(_HH_ROLES[role], content) for role, content in zip(turns[::2], turns[1::2], strict=True))


def begins_with_marker(value: Any) -> bool:
    """Whether a value is text that begins with a ``Human:`` marker."""
    return isinstance(value, str) and _HH_BEGINNING.match(value) is not None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(role in value and content in value for role, content in _NOTATIONS)


def _message(message: Any, name: str) -> Message:
    if isinstance(message, dict) and len(message) == 2:  # as most are
        role, content = message.get("role"), message.get("content")
        if isinstance(content, str) and isinstance(role, str) and role in ROLES:
            return Message(ROLES[role], content)
    role_key, content_key = _NOTATIONS[isinstance(message, dict) and "from" in message and "value" in message]
    if not isinstance(message, dict) or role_key not in message or content_key not in message:
        raise ValueError(f"each message of {name} must be an object with 'role' and 'content', or 'from' and 'value'")
    given = message[role_key]
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise ValueError(f"unknown {role_key} {given!r} in {name}; known: {', '.join(ROLES)}")
    if len(message) == 2 and isinstance(message[content_key], str):
        return Message(role, message[content_key])
    for field, value in message.items():
        if value not in (None, "", [], {}) and any(word in field.lower() for word in _NOT_TEXT):
            raise ValueError(f"a message of {name} has {field!r}: only text can be trained on")
    extra = {field: message[field] for field in _PASSED_ON if message.get(field) not in (None, "", [], {})}
    if role not in ("tool", "assistant"):
        extra.pop("name", None)
    content = message[content_key]
    content = "" if content is None and "tool_calls" in extra else _joined(content, f"{content_key} in {name}")
    return Message(role, content, json.dumps(extra, ensure_ascii=False) if extra else "")


def _joined(content: Any, name: str) -> str:
    """A message's content: a text, or a list of text parts, which templates join without a separator."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{name} must be text, got {type(content).__name__}")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part.get("text", part.get("content")) if isinstance(part, dict) else part
        if kind not in (None, "text") or not isinstance(text, str):
            raise ValueError(f"{name} has a part of type {kind or type(part).__name__}: only text can be trained on")
        texts.append(text)
    return "".join(texts)
