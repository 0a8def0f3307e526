"""Anthropic's HH: both sides are the text of a whole conversation."""

from treg_megatron.formats.fields import SIDES, required, scores, text
from treg_megatron.formats.messages import begins_with_marker, turns_of_text
from treg_megatron.formats.pair_format import Answered, PairFormat


def _read(row: dict) -> Answered:
    chosen, rejected = (turns_of_text(text(required(row, side), side), side) for side in SIDES)
    for side, turns in zip(SIDES, (chosen, rejected), strict=True):
        if not turns or turns[-1].role != "assistant":
            raise ValueError(f"{side} must end with an `Assistant:` turn")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("chosen and rejected must be the same conversation up to the last `Assistant:`")
    return Answered(chosen[:-1], chosen[-1].content, rejected[-1].content, *scores(row))


HH = PairFormat(
    "hh",
    "chosen, rejected as text of `Human:` and `Assistant:` turns",
    SIDES,
    _read,
    fits=lambda row: begins_with_marker(row["chosen"]),
    hub=("Anthropic/hh-rlhf",),
)
