"""LLaMA-Factory's alpaca form: an instruction with an optional input."""

from treg_megatron.formats.fields import SIDES, answer, required, scores, text
from treg_megatron.formats.messages import is_conversation
from treg_megatron.formats.pair_format import Answered, PairFormat
from treg_megatron.tokenizer.conversation import Message


def _read(row: dict) -> Answered:
    parts = [text(row[name], name) for name in ("instruction", "input") if row.get(name) is not None]
    messages = (Message("user", "\n".join(part for part in parts if part)),)
    if row.get("output") is None:
        return Answered(messages, *(answer(row, side, messages) for side in SIDES), *scores(row))
    output = required(row, "output")
    if not isinstance(output, list) or len(output) != 2:
        raise ValueError("output must be a list of two answers, the preferred one first")
    return Answered(messages, *(text(side, "output") for side in output), *scores(row))


ALPACA = PairFormat(
    "alpaca",
    "instruction, input (optional), chosen, rejected",
    ("instruction", *SIDES),
    _read,
    also=("input",),
    fits=lambda row: not is_conversation(row["chosen"]) and row.get("output") is None,
)

ALPACA_OUTPUT = PairFormat(
    "alpaca_output",
    "instruction, input (optional), output: a list of the preferred answer and the other",
    ("instruction", "output"),
    _read,
    also=("input",),
    fits=lambda row: isinstance(row["output"], list),
)
