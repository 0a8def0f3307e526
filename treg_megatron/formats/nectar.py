"""Nectar: seven answers with ranks to a prompt in HH's notation."""

from treg_megatron.formats.fields import best_and_worst, list_of_objects, prompt, required, text
from treg_megatron.formats.pair_format import Answered, PairFormat


def _read(row: dict) -> Answered:
    answers = list_of_objects(required(row, "answers"), "answers", ["answer", "rank"])
    best, worst = best_and_worst([answer["rank"] for answer in answers], "rank", lowest_is_best=True)
    chosen, rejected = (text(answers[i]["answer"], "answer in answers") for i in (best, worst))
    return Answered(prompt(required(row, "prompt")), chosen, rejected)


NECTAR = PairFormat(
    "nectar",
    "prompt, answers with rank (1 is best): best and worst",
    ("prompt", "answers"),
    _read,
    hub=("berkeley-nest/Nectar",),
)
