"""Anthropic's HH: both sides are the text of a whole conversation."""

from treg_megatron.formats.fields import SIDES, required, scores, text
from treg_megatron.formats.messages import begins_with_marker, parted, turns_of_text
from treg_megatron.formats.pair_format import Answered, PairFormat


def _read(row: dict) -> Answered:
    chosen, rejected = (turns_of_text(text(required(row, side), side), side) for side in SIDES)
    for side, turns in zip(SIDES, (chosen, rejected), strict=True):
        if not turns or turns[-1].role != "assistant":
            raise ValueError(f"{side} must end with an `Assistant:` turn")
    return Answered(*parted(chosen, rejected), *scores(row))


HH = PairFormat(
    "hh",
    "chosen, rejected as text of `Human:` and `Assistant:` turns",
    SIDES,
    _read,
    fits=lambda row: begins_with_marker(row["chosen"]),
    hub=("Anthropic/hh-rlhf",),
)
