"""OpenAI's preference fine-tuning form."""

from treg_megatron.formats.fields import answer, required, scores
from treg_megatron.formats.messages import as_messages
from treg_megatron.formats.pair_format import Answered, PairFormat
from treg_megatron.formats.tools import tools_text

_OUTPUTS = ("preferred_output", "non_preferred_output")


def _read(row: dict) -> Answered:
    given = required(row, "input")
    if not isinstance(given, dict) or given.get("messages") is None:
        raise ValueError("input must be an object with 'messages'")
    messages = as_messages(given["messages"], "input.messages")
    answers = (answer(row, name, messages) for name in _OUTPUTS)
    return Answered(messages, *answers, *scores(row), tools_text(given.get("tools"), "input.tools"))


OPENAI = PairFormat(
    "openai",
    "input with messages and tools, preferred_output, non_preferred_output",
    ("input", *_OUTPUTS),
    _read,
)
