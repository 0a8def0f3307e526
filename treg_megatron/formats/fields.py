"""Fields that many formats share: prompts, answers, scores, choices among several answers."""

from collections.abc import Sequence
from typing import Any

from treg_megatron.formats.messages import (
    answer_of,
    as_messages,
    begins_with_marker,
    is_conversation,
    is_messages,
    turns_of_text,
)
from treg_megatron.formats.pair_format import Answer, NoPreference
from treg_megatron.tokenizer.conversation import Message

SIDES = ("chosen", "rejected")

#: Names in use for the score of a side.
SCORES = {
    side: (f"{side}_score", f"score_{side}", f"{side}_rating", f"{side}-rating", f"{side}_avg_rating", f"{side}_reward")
    for side in SIDES
}


def required(row: dict, name: str) -> Any:
    """A column's value.

    Raises:
        ValueError: it is absent or null.
    """
    if row.get(name) is None:
        raise ValueError(f"key {name!r} is missing")
    return row[name]


def text(value: Any, name: str) -> str:
    """The value, which must be text.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}")
    return value


def prompt(value: Any, name: str = "prompt") -> tuple[Message, ...]:
    """The conversation up to the answer: a list of messages, text of turns as HH has them, or one user turn as text.

    Raises:
        ValueError: it is none of these.
    """
    if not isinstance(value, str) or is_messages(value):
        return as_messages(value, name)
    if begins_with_marker(value):
        turns = turns_of_text(value, name)
        if turns[-1].role == "assistant" and not turns[-1].content.strip():
            last = turns[-2:-1] if len(turns) > 1 else ()
            return (*turns[:-2], *(turn._replace(content=turn.content.rstrip(" ")) for turn in last))
        if len(turns) > 1:
            return turns
    return (Message("user", value),)


def answer(row: dict, name: str, conversation: tuple[Message, ...] = ()) -> Answer:
    """One side's answer: a text, the assistant's message or turns, or the whole conversation that ends with them.

    Raises:
        ValueError: it is none of these, or its conversation is not the pair's.
    """
    value = required(row, name)
    if isinstance(value, str) and not is_messages(value):
        return value
    messages = as_messages(value, name)
    if conversation and messages[: len(conversation)] == conversation:
        messages = messages[len(conversation) :]
    return answer_of(messages, name)


def scores(row: dict) -> tuple[Any, Any]:
    """Scores of both sides, unchecked, under the names in common use."""
    chosen, rejected = (next((row[n] for n in SCORES[side] if row.get(n) is not None), None) for side in SIDES)
    return chosen, rejected


def best_and_worst(values: Sequence[Any], name: str, lowest_is_best: bool = False) -> tuple[int, int]:
    """Positions of the best and the worst of several numbers, the first of each.

    Raises:
        ValueError: there are fewer than two, or one is not a number.
        NoPreference: all are equal.
    """
    if len(values) < 2:
        raise ValueError(f"{name} must be at least two")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise ValueError(f"{name} must hold numbers, got {value!r}")
    low, high = values.index(min(values)), values.index(max(values))
    if values[low] == values[high]:
        raise NoPreference
    return (low, high) if lowest_is_best else (high, low)


def list_of_objects(value: Any, name: str, keys: Sequence[str]) -> list[dict]:
    """The value, which must be a list of objects that have all of ``keys``.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, list) or not all(
        isinstance(item, dict) and all(item.get(key) is not None for key in keys) for item in value
    ):
        raise ValueError(f"{name} must be a list of objects with {' and '.join(map(repr, keys))}")
    return value


def whole_conversations(row: dict) -> bool:
    """Whether both sides hold whole conversations."""
    return all(is_conversation(row.get(side)) for side in SIDES)
