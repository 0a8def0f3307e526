"""ms-swift: a conversation that ends with the preferred answer, and the other answer."""

from treg_megatron.formats.fields import required, scores, text
from treg_megatron.formats.messages import answer_of, as_messages, parted
from treg_megatron.formats.pair_format import Answered, PairFormat

_REJECTED = ("rejected_response", "rejected_messages")


def _read(row: dict) -> Answered:
    messages = as_messages(required(row, "messages"), "messages")
    if row.get("rejected_response") is not None:
        rejected = text(row["rejected_response"], "rejected_response")
        return Answered(messages[:-1], answer_of(messages[-1:], "messages"), rejected, *scores(row))
    other = as_messages(required(row, "rejected_messages"), "rejected_messages")
    return Answered(*parted(messages, other), *scores(row))


SWIFT = PairFormat(
    "swift",
    "messages, rejected_response or rejected_messages",
    ("messages",),
    _read,
    also=_REJECTED,
    fits=lambda row: any(row.get(name) is not None for name in _REJECTED),
)
