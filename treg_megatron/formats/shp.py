"""Stanford Human Preferences: a post and two comments, of which readers voted one higher."""

from treg_megatron.formats.fields import required, text
from treg_megatron.formats.pair_format import Answered, PairFormat
from treg_megatron.tokenizer.conversation import Message

_COMMENTS = ("human_ref_A", "human_ref_B")
_SCORES = ("score_A", "score_B")


def _read(row: dict) -> Answered:
    first = required(row, "labels")
    if type(first) is not int or first not in (0, 1):
        raise ValueError(f"labels must be 1 (A is preferred) or 0, got {first!r}")
    order = (0, 1) if first else (1, 0)
    comments = [text(required(row, _COMMENTS[i]), _COMMENTS[i]) for i in order]
    return Answered(
        (Message("user", text(required(row, "history"), "history")),), *comments, *(row.get(_SCORES[i]) for i in order)
    )


SHP = PairFormat(
    "shp",
    "history, human_ref_A, human_ref_B, labels (1: A is preferred)",
    ("history", *_COMMENTS, "labels"),
    _read,
    hub=("stanfordnlp/SHP", "stanfordnlp/SHP-2"),
)
