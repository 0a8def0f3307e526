"""The ``accuracy`` step: how well a policy tells chosen from rejected responses, and how far it is from its reference.

    reference/     log pi_ref of the pairs, unless the labels bring them; may be shared by several policies
    policy/        log pi of the pairs
    samples/       log pi and log pi_ref of the policy's own answers, for the KL divergence
    accuracy.json  the figures, written last

The first three are folders of shards (:mod:`treg_megatron.evaluation.accuracy.log_probs`), so that another beta, or
answers that come later, cost only what is new.
"""

import functools
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from treg_megatron.config.schema import AccuracySection
from treg_megatron.data.labelled_pairs import labelling_run
from treg_megatron.data.records import source_identity
from treg_megatron.errors import UserError
from treg_megatron.evaluation.accuracy.figures import REWARDS, PairLogProbs, preference_figures
from treg_megatron.evaluation.accuracy.kl import answer_items, kl_figures
from treg_megatron.evaluation.accuracy.log_probs import Item, LogProbShards
from treg_megatron.evaluation.accuracy.pair_items import PairItems, is_labelled, pair_items
from treg_megatron.evaluation.accuracy.reward_bench import section_averages
from treg_megatron.evaluation.answer_folder import Answers, read_answers
from treg_megatron.evaluation.arm import hugging_face_folder
from treg_megatron.labelling.scoring import Scorer
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer
from treg_megatron.tokenizer.model_folder import require_embeddings
from treg_megatron.utils.files import read_manifest, sha256_of_json, write_manifest
from treg_megatron.utils.lock import Held, Lock, remove_abandoned_locks

FORMAT, VERSION = "treg-megatron accuracy", 1
FILE_NAME = "accuracy.json"
ALL = "all"
CONFIDENCE = 0.95

logger = logging.getLogger(__name__)


class _Step(NamedTuple):
    """Shards to fill, what the progress bar calls them, and what the items are."""

    name: str
    unit: str
    shards: LogProbShards


def accuracy(section: AccuracySection) -> dict[str, Any] | None:
    """Measure ``section.model`` on ``section.pairs``, or resume where an earlier call stopped.

    Under torchrun or srun each process scores its share.

    Returns:
        The content of accuracy.json: ``model``, ``reference``, ``pairs``, ``drops``, ``beta``, ``confidence``;
        ``subsets`` by name, ``all`` among them (:func:`preference_figures`); ``sections``, RewardBench's averages by
        the name of a reward, or None; ``kl`` (:func:`kl_figures`) with how the answers were sampled, or None; and
        ``run``. None while other processes are still working.

    Raises:
        UserError: the input or the models are unusable, or the output folder holds another run.
    """
    for name in ("shard_pairs", "max_length", "batch_tokens"):
        if getattr(section, name) < 1:
            raise UserError(f"accuracy.{name}={getattr(section, name)} must be at least 1")
    if not section.beta > 0:
        raise UserError(f"accuracy.beta is {section.beta}: it must be positive")
    section = replace(section, model=str(hugging_face_folder(section.model)))
    tokenizer = load_tokenizer(section.model)
    answers = read_answers(section.answers) if section.answers else None
    run = _fingerprint(section, tokenizer, answers)
    path = Path(section.output) / FILE_NAME
    if path.exists():
        found = read_manifest(path, FORMAT, VERSION)
        if found["run"] == run:
            return found
    pairs = pair_items(section, tokenizer)
    samples = answer_items(answers, tokenizer) if answers else []
    policy, reference = (_steps(who, section, run, pairs, samples) for who in ("policy", "reference"))
    _fill(policy, section.model, section, tokenizer)
    _fill(reference, section.reference, section, tokenizer)
    if not all(step.shards.is_complete() for step in (*policy.values(), *reference.values())):
        return None
    of_pairs = _pair_log_probs(pairs, policy, reference)
    kl = None
    if answers:
        kl = kl_figures(policy["samples"].shards.read(), reference["samples"].shards.read(), CONFIDENCE)
        kl["sampled"] = _sampled(answers)
    return _finish(path, section, run, pairs, of_pairs, kl)


def _fingerprint(section: AccuracySection, tokenizer: ChatTokenizer, answers: Answers | None) -> dict[str, Any]:
    """Everything that determines the figures. Batch size and device are left out: they only change rounding."""
    from treg_megatron.models.huggingface import model_identity  # imports torch

    precision = {"dtype": section.dtype}
    model = model_identity(section.model)
    if answers:
        _require_own(answers, model, section)
    labels = (labelling_run(section.pairs) or {}).get("reference") if is_labelled(section.pairs) else None
    if labels and not answers:
        reference = labels  # the reference model itself need not be there
    else:
        reference = {**model_identity(section.reference), **precision}
        if labels and labels["sha256"] != reference["sha256"]:
            raise UserError(f"{section.pairs} was labelled by another reference model than {section.reference}")
    return {
        "model": {**model, **precision},
        "reference": reference,
        "tokenizer": tokenizer.identity,
        "pairs": source_identity(section.pairs),
        "reading": {"format": section.format, "columns": dict(section.columns), "ignore": list(section.ignore)},
        "subset": section.subset,
        "answers": answers and {"name": answers.name, "sha256": sha256_of_json(answers.rows)},
        "beta": section.beta,
        "max_length": section.max_length,
        "shard_pairs": section.shard_pairs,
    }


def _require_own(answers: Answers, model: dict[str, str], section: AccuracySection) -> None:
    """Check that the policy itself gave the answers, where their manifest tells what did.

    Raises:
        UserError: it did not.
    """
    answered_by = ((answers.manifest or {}).get("run") or {}).get("model") or {}
    if answered_by.get("sha256", model["sha256"]) != model["sha256"]:
        raise UserError(
            f"{section.answers} holds answers of another model than {section.model}: the KL is measured on the "
            "policy's own samples"
        )


def _steps(
    who: str, section: AccuracySection, run: dict[str, Any], pairs: PairItems, samples: Sequence[Item]
) -> dict[str, _Step]:
    """What a model scores: ``pairs``, unless the labels bring the values, and ``samples``, if there are any."""
    output = Path(section.output)
    model = {"model": run["model" if who == "policy" else "reference"], "tokenizer": run["tokenizer"]}
    steps = {}
    if who == "policy" or pairs.reference is None:
        folder = output / who if who == "policy" else Path(section.reference_cache)
        key = "accuracy.output" if who == "policy" else "accuracy.reference_cache"
        scored = {name: run[name] for name in ("pairs", "reading", "max_length", "shard_pairs")}
        shards = LogProbShards(folder, {**model, **scored}, key, pairs.items, section.shard_pairs)
        steps["pairs"] = _Step(f"{who}, pairs", "pairs", shards)
    if samples:
        scored = {name: run[name] for name in ("answers", "shard_pairs")}
        folder = output / "samples" / who
        shards = LogProbShards(folder, {**model, **scored}, "accuracy.output", samples, section.shard_pairs)
        steps["samples"] = _Step(f"{who}, own answers", "prompts", shards)
    return steps


def _fill(steps: dict[str, _Step], folder: str, section: AccuracySection, tokenizer: ChatTokenizer) -> None:
    """Score what is left; the model is loaded once, if anything is, and freed afterwards."""

    @functools.cache
    def load() -> Scorer:
        from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer

        if load_tokenizer(folder).sha256 != tokenizer.sha256:
            raise UserError(f"{folder} has another tokenizer than {section.model}: their log-probs cannot be compared")
        scorer = HuggingFaceScorer(folder, section.dtype, section.device, section.batch_tokens)
        require_embeddings(tokenizer.vocab_size, scorer.vocab_size, folder)
        return scorer

    for step in steps.values():
        step.shards.fill(step.name, step.unit, load)


def _pair_log_probs(pairs: PairItems, policy: dict[str, _Step], reference: dict[str, _Step]) -> PairLogProbs:
    of_reference = pairs.reference if pairs.reference is not None else reference["pairs"].shards.read()

    def sums(rows: Any) -> np.ndarray:
        return np.array([[values.sum(dtype=np.float64) for values in row] for row in rows])

    tokens = np.array([[mask.sum() for mask in item.scored] for item in pairs.items])
    return PairLogProbs(sums(policy["pairs"].shards.read()), sums(of_reference), tokens, np.array(pairs.prompts))


def _sampled(answers: Answers) -> dict[str, Any]:
    """How the answers were sampled, and whether the estimate is of the policy itself."""
    settings = answers.settings or {}
    sampled = {name: settings.get(name) for name in ("temperature", "top_p")}
    exact = sampled["temperature"] == 1 and sampled["top_p"] == 1
    if not exact:
        logger.warning(
            "the answers were sampled at temperature %s and top_p %s, so the KL is that of these answers; sample at 1 "
            "and 1 for the KL of the policy",
            sampled["temperature"],
            sampled["top_p"],
        )
    return {**sampled, "exact": exact}


def _finish(
    path: Path,
    section: AccuracySection,
    run: dict[str, Any],
    pairs: PairItems,
    of_pairs: PairLogProbs,
    kl: dict[str, Any] | None,
) -> dict[str, Any]:
    named = np.array([subset or "" for subset in pairs.subsets])
    subsets = {ALL: preference_figures(of_pairs, section.beta, CONFIDENCE)}
    for subset in sorted(set(named) - {""}):
        subsets[str(subset)] = preference_figures(of_pairs[named == subset], section.beta, CONFIDENCE)
    sections = {
        reward: section_averages({name: figures[f"{reward}_accuracy"] for name, figures in subsets.items()})
        for reward in REWARDS
    }
    content = {
        "model": run["model"],
        "reference": run["reference"],
        "pairs": run["pairs"],
        "drops": dict(sorted(Counter(pairs.drops).items())),
        "beta": section.beta,
        "confidence": CONFIDENCE,
        "subsets": subsets,
        "sections": sections if sections[REWARDS[0]] else None,
        "kl": kl,
        "run": run,
    }
    while True:
        try:
            with Lock(path):
                write_manifest(path, FORMAT, VERSION, content)
            break
        except Held:  # another process of the job is writing the same
            time.sleep(0.05)
    for folder in {path.parent, Path(section.reference_cache)}:
        remove_abandoned_locks(folder)
    return read_manifest(path, FORMAT, VERSION)
