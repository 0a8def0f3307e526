"""Readers for the common preference-data formats, in one table.

To add a format: write a function that turns a record into an :class:`Answered`, and add an entry to :data:`FORMATS`.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from treg_megatron.tokenizer.conversation import Message

AUTO = "auto"  # recognise the format from the first record


class Answered(NamedTuple):
    """A conversation and two answers to it, the preferred one first, with scores where the record has them."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None


class NoPreference(Exception):
    """A well-formed record without training signal: its answers have equal ranks or scores."""


class PairFormat(NamedTuple):
    """A preference-data format: its name, a description of its keys, a predicate for its records, and a reader.

    ``read`` raises ``ValueError`` for an unusable record, :class:`NoPreference` for one without a preference.
    """

    name: str
    keys: str
    matches: Callable[[dict], bool]
    read: Callable[[dict], Answered]


def _trl_explicit(row: dict) -> Answered:
    return Answered(_prompt(_required(row, "prompt")), *(_completion(row, name) for name in _SIDES), *_scores(row))


def _trl_implicit(row: dict) -> Answered:
    sides = [_messages(_required(row, name), name) for name in _SIDES]
    if sides[0][:-1] != sides[1][:-1]:
        raise ValueError("chosen and rejected must be the same conversation up to the last turn")
    return Answered(
        sides[0][:-1], *(_answer(side, name) for side, name in zip(sides, _SIDES, strict=True)), *_scores(row)
    )


def _ultrafeedback(row: dict) -> Answered:
    answered = _trl_implicit(row)
    prompt = _text(_required(row, "prompt"), "prompt")
    if prompt.strip() not in (message.content.strip() for message in answered.messages if message.role == "user"):
        raise ValueError("prompt is not among the user turns of chosen and rejected")
    return answered


def _common_prefix(row: dict) -> Answered:
    chosen, rejected = (_text(_required(row, name), name) for name in _SIDES)
    length = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected))
    )
    spaces = [match.span() for match in re.finditer(r"\s+", chosen) if match.start() < length and match.start() > 0]
    if chosen == rejected:
        raise NoPreference
    if not spaces:
        raise ValueError("chosen and rejected have no common prefix that could be the prompt")
    start, end = spaces[-1]
    while rejected[start:end] != chosen[start:end]:
        end -= 1  # the answers themselves begin with different whitespace
    return Answered((Message("user", chosen[:start]),), chosen[end:], rejected[end:], *_scores(row))


def _hh(row: dict) -> Answered:
    sides = []
    for name in _SIDES:
        context, found, answer = _text(_required(row, name), name).rpartition("\n\nAssistant:")
        if not found:
            raise ValueError(f"{name} has no `\\n\\nAssistant:` turn")
        sides.append((context, answer.removeprefix(" ")))
    (context, chosen), (other, rejected) = sides
    if context != other:
        raise ValueError("chosen and rejected must be the same conversation up to the last `Assistant:`")
    before, *turns = re.split(r"\n\n(Human|Assistant): ?", context)
    if before:
        raise ValueError("text before the first `\\n\\nHuman:`")
    messages = tuple(Message(_HH_ROLES[role], content) for role, content in zip(turns[::2], turns[1::2], strict=True))
    return Answered(messages, chosen, rejected, *_scores(row))


def _simpo(row: dict) -> Answered:
    responses, scores = _required(row, "all_generated_responses"), _required(row, "all_rm_scores")
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores) or not scores:
        raise ValueError("all_generated_responses and all_rm_scores must be lists of the same length")
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, (int, float)) or score != score:
            raise ValueError(f"all_rm_scores must hold numbers, got {score!r}")
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        raise NoPreference
    return Answered(
        _prompt(_required(row, "prompt")),
        *(_text(responses[i], "all_generated_responses") for i in (best, worst)),
        scores[best],
        scores[worst],
    )


def _nemo_rl(row: dict) -> Answered:
    completions = _required(row, "completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise ValueError("completions must be a list of objects with 'rank' and 'completion'")
    ranks = [_required(c, "rank") for c in completions]
    if len(ranks) < 2 or not all(isinstance(rank, int) and not isinstance(rank, bool) for rank in ranks):
        raise ValueError("completions must be at least two, each with an integer rank")
    best, worst = (completions[ranks.index(extreme(ranks))] for extreme in (min, max))
    if best["rank"] == worst["rank"]:
        raise NoPreference
    return Answered(
        _prompt(_required(row, "context"), "context"), *(_completion(c, "completion") for c in (best, worst))
    )


def _nemo_aligner(row: dict) -> Answered:
    prompt = _required(row, "prompt")
    if isinstance(prompt, str) and "<extra_id_" in prompt:
        raise ValueError(
            "prompt already carries a chat template (<extra_id_...>), which would be applied twice: give "
            "the bare text or a list of messages"
        )
    responses = [_text(_required(row, name), name) for name in ("chosen_response", "rejected_response")]
    return Answered(_prompt(prompt), *responses, *_scores(row, "chosen_reward", "rejected_reward"))


def _swift(row: dict) -> Answered:
    messages = _messages(_required(row, "messages"), "messages")
    if row.get("rejected_response") is not None:
        rejected = _text(row["rejected_response"], "rejected_response")
    else:
        other = _messages(_required(row, "rejected_messages"), "rejected_messages")
        if other[:-1] != messages[:-1]:
            raise ValueError("messages and rejected_messages must be the same conversation up to the last turn")
        rejected = _answer(other, "rejected_messages")
    return Answered(messages[:-1], _answer(messages, "messages"), rejected, *_scores(row))


def _sharegpt(row: dict) -> Answered:
    messages = _messages(_required(row, "conversations"), "conversations", _SHAREGPT)
    if row.get("system"):
        messages = (Message("system", _text(row["system"], "system")), *messages)
    return Answered(
        messages, *(_answer(_messages([_required(row, name)], name, _SHAREGPT), name) for name in _SIDES), *_scores(row)
    )


class _Keys(NamedTuple):
    role: str
    content: str
    roles: dict[str, str]


_SIDES = ("chosen", "rejected")
_OPENAI = _Keys("role", "content", {role: role for role in ("system", "user", "assistant")})
_SHAREGPT = _Keys("from", "value", {"human": "user", "gpt": "assistant", **_OPENAI.roles})
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}

#: Order matters: the first format that matches the first record is used, so formats with more keys come first.
FORMATS = (
    PairFormat(
        "sharegpt", "conversations, chosen, rejected", lambda row: _has(row, "conversations", *_SIDES), _sharegpt
    ),
    PairFormat(
        "simpo",
        "prompt, all_generated_responses, all_rm_scores",
        lambda row: _has(row, "all_generated_responses", "all_rm_scores"),
        _simpo,
    ),
    PairFormat("nemo_rl", "context, completions with rank", lambda row: _has(row, "context", "completions"), _nemo_rl),
    PairFormat(
        "nemo_aligner",
        "prompt, chosen_response, rejected_response",
        lambda row: _has(row, "prompt", "chosen_response", "rejected_response"),
        _nemo_aligner,
    ),
    PairFormat(
        "swift",
        "messages, rejected_response or rejected_messages",
        lambda row: _has(row, "messages") and (_has(row, "rejected_response") or _has(row, "rejected_messages")),
        _swift,
    ),
    PairFormat(
        "ultrafeedback",
        "prompt as text; chosen, rejected as whole conversations",
        lambda row: isinstance(row.get("prompt"), str) and _is_conversation(row.get("chosen")),
        _ultrafeedback,
    ),
    PairFormat("trl", "prompt, chosen, rejected", lambda row: _has(row, "prompt", *_SIDES), _trl_explicit),
    PairFormat(
        "trl_implicit",
        "chosen, rejected as whole conversations",
        lambda row: isinstance(row.get("chosen"), list) and _has(row, "rejected"),
        _trl_implicit,
    ),
    PairFormat(
        "hh",
        "chosen, rejected as text of `Human:` and `Assistant:` turns",
        lambda row: _has(row, *_SIDES) and str(row["chosen"]).startswith("\n\nHuman:"),
        _hh,
    ),
    PairFormat(
        "trl_implicit_text",
        "chosen, rejected as text with a common beginning",
        lambda row: _has(row, *_SIDES),
        _common_prefix,
    ),
)


def _has(row: dict, *names: str) -> bool:
    return all(row.get(name) is not None for name in names)


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1


def _required(row: dict, name: str) -> Any:
    if row.get(name) is None:
        raise ValueError(f"key {name!r} is missing")
    return row[name]


def _scores(row: dict, *more: str) -> tuple[Any, Any]:
    """Scores of both sides, unvalidated, under the key names in common use."""
    names = [(f"{side}_score", f"score_{side}", *(name for name in more if name.startswith(side))) for side in _SIDES]
    return tuple(next((row[n] for n in side if row.get(n) is not None), None) for side in names)


def _prompt(value: Any, name: str = "prompt") -> tuple[Message, ...]:
    return (Message("user", value),) if isinstance(value, str) else _messages(value, name)


def _completion(row: dict, name: str) -> str:
    value = _required(row, name)
    if isinstance(value, str):
        return value
    messages = _messages(value, name)
    if len(messages) != 1 or messages[0].role != "assistant":
        raise ValueError(f"{name} must be a text or one assistant message")
    return messages[0].content


def _answer(messages: tuple[Message, ...], name: str) -> str:
    if not messages or messages[-1].role != "assistant":
        raise ValueError(f"{name} must end with an assistant turn")
    return messages[-1].content


def _messages(value: Any, name: str, keys: _Keys = _OPENAI) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list of messages, got {type(value).__name__}")
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {keys.role, keys.content} <= message.keys():
            raise ValueError(f"each message of {name} must be an object with {keys.role!r} and {keys.content!r}")
        role = message[keys.role]
        if not isinstance(role, str) or role not in keys.roles:
            raise ValueError(f"unknown {keys.role} {role!r} in {name}; known: {', '.join(keys.roles)}")
        messages.append(Message(keys.roles[role], _text(message[keys.content], f"{keys.content} in {name}")))
    return tuple(messages)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {type(value).__name__}")
    return value
