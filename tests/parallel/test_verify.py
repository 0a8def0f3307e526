"""verify compared with transformers: the same model gives the same log-probs, a different one is detected."""

import json

import pytest

from tests.support.forked import run_ranks
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_families import tiny_family
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.logprobs import TOLERANCE, Difference, logprob_difference

TEXTS = ("The capital of France is Paris.", "Two plus three is five, and seven minus four is three.")


@pytest.fixture
def model(tmp_path):
    hf = tmp_path / "hf"
    tiny_family(hf, "Gemma2", tied=True, vocab=tiny_tokenizer(hf))
    import_checkpoint(hf, tmp_path / "checkpoint")
    return hf, tmp_path / "checkpoint"


def compute(checkpoint, hf, texts=TEXTS) -> Difference:
    [difference] = run_ranks(1, logprob_difference, checkpoint, hf, texts)
    return difference


def test_the_same_model_computes_the_same(model):
    hf, checkpoint = model
    difference = compute(checkpoint, hf)
    assert difference.tokens > 20 and difference.largest < TOLERANCE


def test_the_same_weights_with_another_config_give_other_log_probs(model):
    """A comparison of weights could not detect this."""
    hf, checkpoint = model
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": None}))
    assert compute(checkpoint, hf).largest > 100 * TOLERANCE


def test_a_text_without_two_tokens_is_refused(model):
    hf, checkpoint = model
    with pytest.raises(AssertionError, match="a log-prob needs at least two"):
        compute(checkpoint, hf, ["a"])
