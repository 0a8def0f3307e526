"""SimPO's on-policy sets: several sampled answers with a reward model's scores."""

from treg_megatron.formats.fields import best_and_worst, prompt, required, text
from treg_megatron.formats.pair_format import Answered, PairFormat


def _read(row: dict) -> Answered:
    responses, scores = required(row, "all_generated_responses"), required(row, "all_rm_scores")
    if not isinstance(responses, list) or not isinstance(scores, list) or len(responses) != len(scores) or not scores:
        raise ValueError("all_generated_responses and all_rm_scores must be lists of the same length")
    best, worst = best_and_worst(scores, "all_rm_scores")
    answers = [text(responses[i], "all_generated_responses") for i in (best, worst)]
    return Answered(prompt(required(row, "prompt")), *answers, scores[best], scores[worst])


SIMPO = PairFormat(
    "simpo",
    "prompt, all_generated_responses, all_rm_scores: best and worst",
    ("prompt", "all_generated_responses", "all_rm_scores"),
    _read,
    also=("chosen", "rejected"),
    hub=("princeton-nlp/llama3-ultrafeedback-armorm", "princeton-nlp/gemma2-ultrafeedback-armorm"),
)
