"""PKU-SafeRLHF: two responses, and two opinions on which is preferred: the better one and the safer one."""

from treg_megatron.formats.fields import prompt, required, text
from treg_megatron.formats.pair_format import Answered, PairFormat

_RESPONSES = ("response_0", "response_1")


def _reader(decides: str):
    def read(row: dict) -> Answered:
        preferred = required(row, decides)
        if type(preferred) is not int or preferred not in (0, 1):
            raise ValueError(f"{decides} must be 0 or 1, got {preferred!r}")
        answers = [text(required(row, _RESPONSES[i]), _RESPONSES[i]) for i in (preferred, 1 - preferred)]
        return Answered(prompt(required(row, "prompt")), *answers)

    return read


PKU_BETTER = PairFormat(
    "pku_better",
    "prompt, response_0, response_1, better_response_id",
    ("prompt", *_RESPONSES, "better_response_id"),
    _reader("better_response_id"),
    hub=("PKU-Alignment/PKU-SafeRLHF",),
)

PKU_SAFER = PairFormat(
    "pku_safer",
    "prompt, response_0, response_1, safer_response_id",
    ("prompt", *_RESPONSES, "safer_response_id"),
    _reader("safer_response_id"),
    hub=("PKU-Alignment/PKU-SafeRLHF",),
)
