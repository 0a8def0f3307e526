"""NVIDIA's HelpSteer3 and HelpSteer2: two responses and a preference from -3 (the first is better) to 3."""

from treg_megatron.formats.fields import prompt, required, text
from treg_megatron.formats.pair_format import Answered, NoPreference, PairFormat


def _reader(conversation: str, responses: tuple[str, str], preference: str):
    def read(row: dict) -> Answered:
        strength = required(row, preference)
        if isinstance(strength, bool) or not isinstance(strength, (int, float)) or strength != strength:
            raise ValueError(f"{preference} must be a number, got {strength!r}")
        if strength == 0:
            raise NoPreference
        chosen, rejected = responses if strength < 0 else responses[::-1]
        answers = [text(required(row, name), name) for name in (chosen, rejected)]
        return Answered(prompt(required(row, conversation), conversation), *answers, abs(strength), 0)

    return read


_THREE = ("context", ("response1", "response2"), "overall_preference")
_TWO = ("prompt", ("response_1", "response_2"), "preference_strength")

HELPSTEER3 = PairFormat(
    "helpsteer3",
    "context, response1, response2, overall_preference: below 0, the first is better; 0 is a tie",
    ("context", *_THREE[1], _THREE[2]),
    _reader(*_THREE),
    hub=("nvidia/HelpSteer3",),
)

HELPSTEER2 = PairFormat(
    "helpsteer2",
    "prompt, response_1, response_2, preference_strength: below 0, the first is better; 0 is a tie",
    ("prompt", *_TWO[1], _TWO[2]),
    _reader(*_TWO),
    hub=("nvidia/HelpSteer2",),
)
