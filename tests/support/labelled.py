"""Labelled pairs of random tokens."""

import numpy as np

from treg_megatron.data.labelled_pairs import LabelledPair


def pair(name: str, prompt: int, chosen: int, rejected: int, reference: bool = True, vocab: int = 384) -> LabelledPair:
    random = np.random.default_rng([prompt, chosen, rejected])
    prompt_ids = random.integers(0, vocab, prompt)
    tokens = [np.concatenate([prompt_ids, random.integers(0, vocab, n)]).astype(np.int32) for n in (chosen, rejected)]
    rewards = [random.uniform(-0.5, 0.5, n).astype(np.float32) for n in (chosen, rejected)]
    logprobs = [-random.exponential(2, n).astype(np.float32) if reference else None for n in (chosen, rejected)]
    return LabelledPair(name, *tokens, *rewards, *logprobs)


THREE = [pair("a", 3, 4, 5), pair("b", 1, 1, 7), pair("\u03b3 3", 6, 2, 2)]
