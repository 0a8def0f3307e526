"""Alignment of logits with response tokens: the only shift by one in the project.

A causal model's output at position i predicts token i + 1. Everything else in this project is indexed by the token it
belongs to. Code that turns model outputs into per-token values must therefore call this module; nothing else shifts
indices.
"""


def score_positions(prompt_length: int, response_length: int) -> slice:
    """The positions whose *next* token is a response token, in a sequence of prompt followed by response.

    For logits [s, vocab], ``logits[score_positions(p, r)]`` is [r, vocab], and its row t predicts ``tokens[p + t]``.

    Args:
        prompt_length: prompt tokens, at least 1.
        response_length: response tokens, end-of-turn token included.

    Raises:
        ValueError: the prompt is empty: nothing predicts the first token of a sequence.
    """
    if prompt_length < 1:
        raise ValueError("a response needs at least one prompt token before it")
    return slice(prompt_length - 1, prompt_length - 1 + response_length)
