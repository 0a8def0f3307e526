"""The reference model's log-probs are the same from Hugging Face and from Megatron, however it is split."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.parallel.forked import run_ranks
from tests.tiny import tiny_llama
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.scoring import ScoredSequence
from treg_megatron.scoring.huggingface import HuggingFaceScorer
from treg_megatron.scoring.megatron import MegatronScorer, replica
from treg_megatron.runtime.launch import World

LAYOUTS = {"TP1": (1, 1), "TP3": (3, 1), "PP2": (1, 2)}


def some_sequences(vocab: int, count: int = 7) -> list[ScoredSequence]:
    random = np.random.default_rng(1)
    shared = random.integers(0, vocab, 20).tolist()
    return [ScoredSequence(shared[:random.integers(1, 20)] + random.integers(0, vocab, 3).tolist(),
                           random.integers(0, vocab, random.integers(1, 25)).tolist()) for _ in range(count)]


def by_megatron(checkpoint: Path, tensor: int, pipeline: int, sequences: list[ScoredSequence]) -> list[np.ndarray]:
    return MegatronScorer(checkpoint, tensor, pipeline, "float32", batch_tokens=64).score(sequences)


def assert_engines_agree(hf: Path, checkpoint: Path, layout: str) -> None:
    sequences = some_sequences(380)
    expected = HuggingFaceScorer(hf, "float32", "cpu", batch_tokens=100).score(sequences)
    tensor, pipeline = LAYOUTS[layout]
    for found in run_ranks(tensor * pipeline, by_megatron, checkpoint, tensor, pipeline, sequences):
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == np.float32
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    """Six heads and three groups, so that the model splits in three."""
    folder = tmp_path_factory.mktemp("engines")
    tiny_llama(folder / "hf", hidden=96, heads=6, kv_heads=3)
    import_checkpoint(folder / "hf", folder / "megatron")
    return folder / "hf", folder / "megatron"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_agree(tiny, layout):
    assert_engines_agree(*tiny, layout)


@pytest.mark.skipif("TREG_REAL_MODEL" not in os.environ, reason="TREG_REAL_MODEL names no folder of SmolLM2")
@pytest.mark.parametrize("layout", ["TP3", "PP2"])
def test_engines_agree_on_a_real_model(layout, tmp_path):
    hf = Path(os.environ["TREG_REAL_MODEL"])
    import_checkpoint(hf, tmp_path / "megatron")
    assert_engines_agree(hf, tmp_path / "megatron", layout)


def test_copies_of_the_model_share_out_the_ranks():
    ranks = [replica(World(rank, 8, rank, 8), tensor=2, pipeline=2) for rank in range(8)]
    assert ranks == [(0, 2, True), (0, 2, False), (1, 2, True), (1, 2, False),
                     (0, 2, False), (0, 2, False), (1, 2, False), (1, 2, False)]
