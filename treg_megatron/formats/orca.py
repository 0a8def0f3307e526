"""The Orca DPO pairs: a question with a system column; and Argilla's edition, which calls the question input."""

from treg_megatron.formats.fields import SIDES, answer, prompt, required, scores
from treg_megatron.formats.pair_format import Answered, NoPreference, PairFormat


def _reader(name: str):
    def read(row: dict) -> Answered:
        if row.get("status") == "tie":
            raise NoPreference
        messages = prompt(required(row, name), name)
        return Answered(messages, *(answer(row, side, messages) for side in SIDES), *scores(row))

    return read


ORCA = PairFormat(
    "orca", "question, chosen, rejected", ("question", *SIDES), _reader("question"), hub=("Intel/orca_dpo_pairs",)
)

ORCA_ARGILLA = PairFormat(
    "orca_argilla",
    "input, chosen, rejected; pairs whose status is tie are left out",
    ("input", *SIDES),
    _reader("input"),
    fits=lambda row: isinstance(row["input"], str),
    hub=("argilla/distilabel-intel-orca-dpo-pairs",),
)
