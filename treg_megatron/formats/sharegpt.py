"""LLaMA-Factory's ShareGPT form and axolotl's: a conversation beside two answers."""

from treg_megatron.formats.fields import SIDES, answer, required, scores
from treg_megatron.formats.messages import as_messages
from treg_megatron.formats.pair_format import Answered, PairFormat


def _reader(name: str):
    def read(row: dict) -> Answered:
        messages = as_messages(required(row, name), name)
        return Answered(messages, *(answer(row, side, messages) for side in SIDES), *scores(row))

    return read


SHAREGPT = PairFormat(
    "sharegpt",
    "conversations, chosen, rejected",
    ("conversations", *SIDES),
    _reader("conversations"),
    hub=("llamafactory/DPO-En-Zh-20k",),
)

AXOLOTL = PairFormat(
    "axolotl",
    "messages, chosen, rejected: the conversation, and one message per side",
    ("messages", *SIDES),
    _reader("messages"),
    fits=lambda row: "prompt" not in row,
)
