"""distilabel: several generations with ratings."""

from treg_megatron.formats.fields import best_and_worst, prompt, required, text
from treg_megatron.formats.pair_format import Answered, PairFormat

_PROMPTS = ("instruction", "prompt", "input")


def _read(row: dict) -> Answered:
    names = [name for name in _PROMPTS if row.get(name)] or ["instruction"]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} are both given: say which is the prompt (--columns)")
    name = names[0]
    generations, ratings = required(row, "generations"), required(row, "ratings")
    if not isinstance(generations, list) or not isinstance(ratings, list) or len(generations) != len(ratings):
        raise ValueError("generations and ratings must be lists of the same length")
    rated = [i for i, rating in enumerate(ratings) if rating is not None and generations[i] is not None]
    values = [ratings[i] for i in rated]
    best, worst = best_and_worst(values, "ratings")
    answers = [text(generations[rated[i]], "generations") for i in (best, worst)]
    return Answered(prompt(required(row, name), name), *answers, values[best], values[worst])


DISTILABEL = PairFormat(
    "distilabel",
    "instruction or prompt, generations, ratings: best and worst",
    ("generations", "ratings"),
    _read,
    also=_PROMPTS,
    fits=lambda row: not any(row.get(side) is not None for side in ("chosen", "rejected")),
)
