"""NeMo-RL's ranked completions and NeMo-Aligner's pairs."""

from treg_megatron.formats.fields import answer, best_and_worst, list_of_objects, prompt, required, scores, text
from treg_megatron.formats.pair_format import Answered, PairFormat

_ALIGNER_SIDES = ("chosen_response", "rejected_response")


def _rl(row: dict) -> Answered:
    completions = list_of_objects(required(row, "completions"), "completions", ["rank", "completion"])
    ranks = [completion["rank"] for completion in completions]
    if len(ranks) < 2 or not all(type(rank) is int for rank in ranks):
        raise ValueError("completions must be at least two, each with an integer rank")
    chosen, rejected = (completions[i] for i in best_and_worst(ranks, "rank", lowest_is_best=True))
    messages = prompt(required(row, "context"), "context")
    return Answered(messages, *(answer(side, "completion", messages) for side in (chosen, rejected)))


def _aligner(row: dict) -> Answered:
    answers = [text(required(row, name), name) for name in _ALIGNER_SIDES]
    name = "prompt" if row.get("prompt") is not None else "instruction"
    return Answered(prompt(required(row, name), name), *answers, *scores(row))


NEMO_RL = PairFormat(
    "nemo_rl", "context, completions with rank (0 is best): best and worst", ("context", "completions"), _rl
)

NEMO_ALIGNER = PairFormat(
    "nemo_aligner",
    "prompt, chosen_response, rejected_response",
    ("prompt", *_ALIGNER_SIDES),
    _aligner,
)

ARGILLA = PairFormat(
    "argilla",
    "instruction, chosen_response, rejected_response",
    ("instruction", *_ALIGNER_SIDES),
    _aligner,
    hub=("argilla/ultrafeedback-binarized-preferences",),
)
