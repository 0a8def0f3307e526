"""ms-swift: a conversation that ends with the preferred answer, and the other answer."""

from treg_megatron.formats.fields import required, scores, text
from treg_megatron.formats.messages import answer_of, as_messages
from treg_megatron.formats.pair_format import Answered, PairFormat

_REJECTED = ("rejected_response", "rejected_messages")


def _read(row: dict) -> Answered:
    messages = as_messages(required(row, "messages"), "messages")
    if row.get("rejected_response") is not None:
        rejected = text(row["rejected_response"], "rejected_response")
    else:
        other = as_messages(required(row, "rejected_messages"), "rejected_messages")
        if other[:-1] != messages[:-1]:
            raise ValueError("messages and rejected_messages must be the same conversation up to the last turn")
        rejected = answer_of(other, "rejected_messages")
    return Answered(messages[:-1], answer_of(messages, "messages"), rejected, *scores(row))


SWIFT = PairFormat(
    "swift",
    "messages, rejected_response or rejected_messages",
    ("messages",),
    _read,
    also=_REJECTED,
    fits=lambda row: any(row.get(name) is not None for name in _REJECTED),
)
