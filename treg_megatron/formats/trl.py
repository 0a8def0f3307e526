"""TRL's three forms: an explicit prompt, whole conversations, and texts whose common beginning is the prompt."""

import re

from treg_megatron.formats.fields import SIDES, answer, prompt, required, scores, text, whole_conversations
from treg_megatron.formats.messages import as_messages, begins_with_marker, is_messages, parted
from treg_megatron.formats.pair_format import Answered, NoPreference, PairFormat
from treg_megatron.tokenizer.conversation import Message


def explicit(row: dict) -> Answered:
    """Read a record of ``prompt``, ``chosen``, ``rejected``."""
    messages = prompt(required(row, "prompt"))
    return Answered(messages, *(answer(row, side, messages) for side in SIDES), *scores(row))


def conversations(row: dict) -> Answered:
    """Read a record whose ``chosen`` and ``rejected`` are whole conversations."""
    chosen, rejected = (as_messages(required(row, side), side) for side in SIDES)
    return Answered(*parted(chosen, rejected), *scores(row))


def _common_prefix(row: dict) -> Answered:
    chosen, rejected = (text(required(row, side), side) for side in SIDES)
    if begins_with_marker(chosen) or is_messages(chosen):
        raise ValueError("chosen holds several turns, which a common beginning would cut: name another format")
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
    return Answered((Message("user", chosen[:start]),), chosen[end:], rejected[end:], *scores(row))


TRL = PairFormat(
    "trl",
    "prompt, chosen, rejected: texts or lists of messages",
    ("prompt", *SIDES),
    explicit,
    hub=("trl-lib/ultrafeedback-prompt", "argilla/dpo-mix-7k"),
)

TRL_IMPLICIT = PairFormat(
    "trl_implicit",
    "chosen, rejected as whole conversations",
    SIDES,
    conversations,
    fits=whole_conversations,
    hub=(
        "trl-lib/ultrafeedback_binarized",
        "Skywork/Skywork-Reward-Preference-80K-v0.2",
        "Magpie-Align/Magpie-Llama-3.1-Pro-DPO-100K-v0.1",
    ),
)

TRL_IMPLICIT_TEXT = PairFormat(
    "trl_implicit_text",
    "chosen, rejected as text with a common beginning",
    SIDES,
    _common_prefix,
    by_name_only=True,
)
