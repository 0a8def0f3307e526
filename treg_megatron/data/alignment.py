"""Where a response token is predicted: the project's only shift by one.

A causal model's output at position i predicts token i + 1. Everything else in this project is stored by the token it
belongs to, so whoever turns model outputs into values of tokens asks here, and nowhere shifts by himself.
"""


def score_positions(prompt_length: int, response_length: int) -> slice:
    """The positions whose *next* token is a response token, in a sequence of prompt followed by response.

    ``logits[score_positions(p, r)]`` has one row for each response token: row t predicts ``tokens[p + t]``.

    Raises:
        ValueError: an empty prompt, because nothing predicts the first token of a sequence.
    """
    if prompt_length < 1:
        raise ValueError("a response needs at least one prompt token before it")
    return slice(prompt_length - 1, prompt_length - 1 + response_length)
