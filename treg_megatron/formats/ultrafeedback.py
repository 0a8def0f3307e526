"""UltraFeedback as published, and binarized."""

from treg_megatron.formats.fields import (
    best_and_worst,
    list_of_objects,
    prompt,
    required,
    text,
    whole_conversations,
)
from treg_megatron.formats.pair_format import Answered, PairFormat
from treg_megatron.formats.trl import conversations

# The published overall_score has known errors; the mean of the four aspects does not.
_SCORES = ("fine-grained_score", "overall_score")


def _binarized(row: dict) -> Answered:
    answered = conversations(row)
    given = text(required(row, "prompt"), "prompt")
    if given.strip() not in (message.content.strip() for message in answered.messages if message.role == "user"):
        raise ValueError("prompt is not among the user turns of chosen and rejected")
    return answered


def _published(row: dict) -> Answered:
    completions = list_of_objects(required(row, "completions"), "completions", ["response"])
    name = next((name for name in _SCORES if all(c.get(name) is not None for c in completions)), None)
    if name is None:
        raise ValueError(f"completions must all have {' or '.join(_SCORES)}")
    values = [completion[name] for completion in completions]
    best, worst = best_and_worst(values, name)
    answers = [text(completions[i]["response"], "response in completions") for i in (best, worst)]
    return Answered(prompt(required(row, "instruction"), "instruction"), *answers, values[best], values[worst])


ULTRAFEEDBACK = PairFormat(
    "ultrafeedback",
    "prompt as text; chosen, rejected as whole conversations",
    ("prompt", "chosen", "rejected"),
    _binarized,
    fits=lambda row: isinstance(row["prompt"], str) and whole_conversations(row),
    hub=(
        "HuggingFaceH4/ultrafeedback_binarized",
        "argilla/ultrafeedback-binarized-preferences-cleaned",
        "allenai/llama-3.1-tulu-3-8b-preference-mixture",
    ),
)

ULTRAFEEDBACK_PUBLISHED = PairFormat(
    "ultrafeedback_published",
    "instruction, completions with response and fine-grained_score or overall_score: best and worst",
    ("instruction", "completions"),
    _published,
    hub=("openbmb/UltraFeedback",),
)
