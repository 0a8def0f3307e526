"""The reference model's log-probs from Hugging Face and from Megatron agree, however the model is split."""

import contextlib
import dataclasses
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from tests.support.forked import run_ranks
from tests.support.tiny import perturb, tiny_llama, tiny_tokenizer
from tests.support.tiny_families import tiny_family
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.config.schema import LabelSection
from treg_megatron.data.labelled_pairs import SIDES, read_labelled
from treg_megatron.data.pairs import Pair
from treg_megatron.distributed.launch import RankInfo
from treg_megatron.errors import UserError
from treg_megatron.labelling.job import label
from treg_megatron.labelling.prompt_pair import load_prompt_pair
from treg_megatron.labelling.scoring import ScoredSequence, megatron
from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer
from treg_megatron.labelling.scoring.megatron import MegatronScorer, _require_same_model, replica
from treg_megatron.labelling.source import ContrastivePrompts, Model
from treg_megatron.tokenizer.chat import load_tokenizer
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils.shard_job import MANIFEST_NAME

LAYOUTS = {"TP1": (1, 1), "TP3": (3, 1), "PP2": (1, 2)}


def some_sequences(vocab: int, count: int = 7) -> list[ScoredSequence]:
    random = np.random.default_rng(1)
    shared = random.integers(0, vocab, 20).tolist()
    return [
        ScoredSequence(
            shared[: random.integers(1, 20)] + random.integers(0, vocab, 3).tolist(),
            random.integers(0, vocab, random.integers(1, 25)).tolist(),
        )
        for _ in range(count)
    ]


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
    """A model with six heads and three groups, so that it can be split in three."""
    folder = tmp_path_factory.mktemp("engines")
    tiny_llama(folder / "hf", hidden=96, heads=6, kv_heads=3)
    import_checkpoint(folder / "hf", folder / "megatron")
    return folder / "hf", folder / "megatron"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_agree(tiny, layout):
    assert_engines_agree(*tiny, layout)


PAIRS = [
    ("What is two plus three?", "Two plus three is five.", "Five, I think, or six."),
    ("Why is the sky blue?", "Because air scatters blue light more than red.", "Because the sea is blue, too."),
]
PROMPT_PAIRS = ("revise", "few_shot", "revise_turn")
SPLITS = {"TP2": (2, 1), "PP2": (1, 2)}


def contexts(folder: Path, prompt_pair: str) -> list[ScoredSequence]:
    """Six sequences per pair: chosen and rejected after the prompts x, x_better and x_worse."""
    tokenizer = load_tokenizer(folder)
    source = ContrastivePrompts(load_prompt_pair(prompt_pair), Model(str(folder), ""))
    sequences = []
    for number, (question, *answers) in enumerate(PAIRS):
        pair = Pair(str(number), (Message("user", question),), *answers)
        prompt, responses = tokenizer.encode_pair(pair.messages, answers)
        for side, ids in zip(SIDES, responses, strict=True):
            prompts = [prompt, *source.prompts(pair, side, prompt, ids, tokenizer).values()]
            sequences += [ScoredSequence(one, ids) for one in prompts]
    return sequences


def whole_and_shared(checkpoints: list[Path], tensor: int, pipeline: int, jobs: list[list[ScoredSequence]]) -> list:
    """For each checkpoint and job: log-probs with prefixes shared and not, and the tokens of the rows of each."""
    results = []
    for checkpoint in checkpoints:
        scorer = MegatronScorer(checkpoint, tensor, pipeline, "float32", batch_tokens=700)
        assert scorer._shares
        for sequences in jobs:
            for scorer._shares in (True, False):
                with count_tokens() as computed:
                    results.append((scorer.score(sequences), sum(computed)))
    return results


@contextlib.contextmanager
def count_tokens():
    """Collects how many tokens each micro-batch has."""
    computed, packed = [], megatron._packed

    def counted(*args):
        batch = packed(*args)
        computed.append(batch["tokens"].numel())
        return batch

    with mock.patch.object(megatron, "_packed", counted):
        yield computed


@pytest.fixture(scope="module")
def two_models(tmp_path_factory) -> dict[str, Path]:
    """A Llama, and a Gemma 2 whose window and soft-caps matter, by name; each with a checkpoint beside it."""
    folder = tmp_path_factory.mktemp("sharing")
    for family in ("Llama", "Gemma2"):
        vocab = tiny_tokenizer(folder / family, template="turns")
        tiny_family(folder / family, family, tied=True, vocab=vocab)
        import_checkpoint(folder / family, folder / f"{family}_megatron")
    return {family: folder / family for family in ("Llama", "Gemma2")}


@pytest.mark.parametrize("split", SPLITS)
def test_shared_prefixes_give_the_log_probs_of_whole_sequences(two_models, split):
    tensor, pipeline = SPLITS[split]
    jobs = [contexts(two_models["Llama"], name) for name in PROMPT_PAIRS]
    expected = [
        np.concatenate(HuggingFaceScorer(folder, "float32", "cpu", batch_tokens=900).score(sequences))
        for folder in two_models.values()
        for sequences in jobs
    ]
    checkpoints = [folder.with_name(f"{family}_megatron") for family, folder in two_models.items()]
    for found in run_ranks(tensor * pipeline, whole_and_shared, checkpoints, tensor, pipeline, jobs):
        for (shared, fewer), (whole, all_tokens), theirs in zip(found[::2], found[1::2], expected, strict=True):
            np.testing.assert_allclose(np.concatenate(shared), np.concatenate(whole), atol=1e-5)
            np.testing.assert_allclose(np.concatenate(shared), theirs, atol=1e-5)
            assert fewer < 0.75 * all_tokens


def test_a_real_model_in_bf16_is_close_to_fp32(smollm2):
    sequences = some_sequences(40_000)
    fp32, bf16 = (
        np.concatenate(HuggingFaceScorer(smollm2, dtype, "cpu").score(sequences)) for dtype in ("float32", "bfloat16")
    )
    assert 0 < np.median(np.abs(bf16 - fp32)) < 0.1


@pytest.fixture(scope="module")
def real(smollm2, tmp_path_factory) -> tuple[Path, Path]:
    checkpoint = tmp_path_factory.mktemp("real") / "megatron"
    import_checkpoint(smollm2, checkpoint)
    return smollm2, checkpoint


@pytest.mark.parametrize("layout", LAYOUTS)
def test_engines_agree_on_a_real_model(real, layout):
    """SmolLM2 has nine heads in three groups."""
    assert_engines_agree(*real, layout)


@pytest.fixture(scope="module")
def job(tied_run, tmp_path_factory) -> LabelSection:
    overrides = [
        *tied_run.overrides,
        f"label.pairs={tied_run.hf.parent}/train.jsonl",
        "label.engine=megatron",
        "label.batch_tokens=300",
        "label.shard_pairs=4",
        f"label.output={tmp_path_factory.mktemp('label')}",
    ]
    return section(load_recipe(tied_run.recipe, overrides), "label")


@pytest.mark.parametrize("tensor, pipeline, ranks", [(2, 1, 2), (1, 2, 4)], ids=["TP2", "two copies of PP2"])
def test_labels_of_a_split_model(tied_run, job, tensor, pipeline, ranks, tmp_path):
    """They equal Hugging Face's, from any copy of the model."""
    job = dataclasses.replace(job, tensor=tensor, pipeline=pipeline, output=str(tmp_path))
    manifests = run_ranks(ranks, label, job)
    assert any(manifests)
    assert_labels_of_hugging_face(tied_run, tmp_path)


def test_a_copy_without_work_left_still_starts_with_the_others(tied_run, job, tmp_path):
    """Only the second of two copies has work left after a kill, but process groups need all ranks."""
    job = dataclasses.replace(job, pipeline=2, output=str(tmp_path))
    run_ranks(4, label, job)
    (tmp_path / MANIFEST_NAME).unlink()
    (tmp_path / "shard-00001.parquet").unlink()
    assert any(run_ranks(4, label, job))
    assert_labels_of_hugging_face(tied_run, tmp_path)


@pytest.mark.parametrize("tensor, pipeline", [(2, 1), (1, 2)], ids=["TP2", "PP2"])
def test_the_log_ratio_of_two_split_models(tied_run, job, tensor, pipeline, tmp_path):
    """Both models are split over the same ranks; the labels equal Hugging Face's."""
    shutil.copytree(tied_run.hf, tmp_path / "better")
    perturb(tmp_path / "better")
    import_checkpoint(tmp_path / "better", tmp_path / "megatron")
    job = dataclasses.replace(
        job,
        source="model_ratio",
        better_model=str(tmp_path / "better"),
        better_checkpoint=str(tmp_path / "megatron"),
        tensor=tensor,
        pipeline=pipeline,
        output=str(tmp_path / "split"),
    )
    assert any(run_ranks(2, label, job))
    label(dataclasses.replace(job, engine="huggingface", output=str(tmp_path / "whole")))
    for ours, theirs in zip(read_labelled(job.output), read_labelled(tmp_path / "whole"), strict=True):
        for side in SIDES:
            assert np.abs(getattr(theirs, f"{side}_token_rewards")).max() > 1e-3
            for values in (f"{side}_ref_logprobs", f"{side}_token_rewards"):
                np.testing.assert_allclose(getattr(ours, values), getattr(theirs, values), atol=1e-4)


def assert_labels_of_hugging_face(tied_run, folder: Path) -> None:
    with_hugging_face = read_labelled(tied_run.hf.parent / "labelled" / "train")
    for ours, theirs in zip(read_labelled(folder), with_hugging_face, strict=True):
        assert ours.pair_id == theirs.pair_id
        for side in SIDES:
            np.testing.assert_array_equal(getattr(ours, f"{side}_tokens"), getattr(theirs, f"{side}_tokens"))
            for values in (f"{side}_ref_logprobs", f"{side}_token_rewards"):
                np.testing.assert_allclose(getattr(ours, values), getattr(theirs, values), atol=1e-4)


def refused(job: LabelSection) -> str:
    try:
        label(job)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_checkpoint_of_another_model_is_refused(job, untied_run, ranks, tmp_path):
    """Every rank refuses it, so that none waits for another."""
    checkpoint = untied_run.hf.parent / "megatron"
    other = dataclasses.replace(job, checkpoint=str(checkpoint), output=str(tmp_path / "labelled"))
    for said in run_ranks(ranks, refused, other):
        assert "is not the model of" in said and "differs; name the checkpoint imported" in said
    assert not (tmp_path / "labelled").exists()


def test_a_split_that_the_model_does_not_allow_is_refused(job):
    with pytest.raises(UserError, match="label.tensor=3 does not divide the model's 4 attention heads; .* do: 1, 2"):
        MegatronScorer(job.checkpoint, 3, 1, "float32", 64)
    with pytest.raises(UserError, match="label.pipeline=3 does not divide the model's 4 layers; .* do: 1, 2, 4"):
        MegatronScorer(job.checkpoint, 1, 3, "float32", 64)


def test_a_model_of_the_same_shape_is_another_model(tiny, tmp_path):
    hf, checkpoint = tiny
    tiny_llama(tmp_path, hidden=96, heads=6, kv_heads=3, seed=1)
    _require_same_model(checkpoint, hf)
    with pytest.raises(UserError, match="model.embed_tokens.weight differs"):
        _require_same_model(checkpoint, tmp_path)


def test_ranks_are_divided_among_copies_of_the_model():
    ranks = [replica(RankInfo(rank, 8, rank, 8), tensor=2, pipeline=2) for rank in range(8)]
    assert ranks == [
        (0, 2, True),
        (0, 2, False),
        (1, 2, True),
        (1, 2, False),
        (0, 2, False),
        (0, 2, False),
        (1, 2, False),
        (1, 2, False),
    ]
