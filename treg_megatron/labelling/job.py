"""The ``label`` step: preference pairs to labelled pairs, with a frozen reference model.

The reference model pi_ref scores the same response ids three times: after the prompt x, for the reference log-probs
that training needs, and after the prompts x_better and x_worse, for the token rewards

    r_t = sigma( log pi_ref(y_t | x_better, y_<t) - log pi_ref(y_t | x_worse, y_<t) ) - 0.5

(Zhou et al., "T-REG", ACL 2025, section 3.2). Other sources of token rewards score them by other models
(:mod:`treg_megatron.labelling.source`).

Every ``shard_pairs`` input pairs become one Parquet file, which carries the fingerprint of its run, so that files of
different runs never mix (:mod:`treg_megatron.utils.shard_job`).
"""

import dataclasses
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treg_megatron.config.schema import LabelSection
from treg_megatron.data.labelled_pairs import (
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    SIDES,
    LabelledPair,
    write_shard,
)
from treg_megatron.data.pairs import IDENTICAL_RESPONSES, Pair, Reading, read_pairs, read_pairs_and_rows
from treg_megatron.data.responses import (
    PROMPT_FILLS_CONTEXT,
    TOO_LONG,
    labelled_pair,
    prompt_answers,
    scored_response,
)
from treg_megatron.data.scored import NOT_SCORED
from treg_megatron.distributed.launch import rank_info
from treg_megatron.errors import UserError
from treg_megatron.labelling.import_rewards import own_columns
from treg_megatron.labelling.manifest import SHARD_PATTERN, Portions, Shards, fingerprint, finish, require_own_output
from treg_megatron.labelling.scoring import ScoredSequence, Scorer
from treg_megatron.labelling.source import MAIN, REFERENCE, Model, Sources, sources_of
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer
from treg_megatron.tokenizer.model_folder import require_embeddings
from treg_megatron.utils.files import read_manifest
from treg_megatron.utils.lock import remove_abandoned_locks
from treg_megatron.utils.parallel import batches, in_order, usable_cores
from treg_megatron.utils.progress import Progress
from treg_megatron.utils.shard_job import MANIFEST_NAME, ShardJob, Share

REVISION_TOO_LONG = "revision prompt and response do not fit max_revision_length"

logger = logging.getLogger(__name__)

_PAIRS_AT_ONCE = 64
_PAIRS_WORTH_A_PROCESS = 256


@dataclass(frozen=True)
class _Prepared:
    """A pair as token ids: the sequence to score for each side and pass. A side's passes share its response.

    ``given`` are the values that the pair brings, by side and name.
    """

    pair: Pair
    sequences: dict[str, dict[str, ScoredSequence]]
    scored: dict[str, np.ndarray]
    given: dict[str, dict[str, np.ndarray]]


def label(section: LabelSection, scorer: Scorer | None = None) -> dict[str, Any] | None:
    """Label ``section.pairs`` into the folder ``section.output``, or resume where an earlier call stopped.

    Under torchrun or srun each process labels its share.

    Args:
        section: the ``label`` settings of the run.
        scorer: the reference model; loaded from ``section.model`` if not given.

    Returns:
        The manifest: ``pairs`` (number labelled), ``drops`` (counts by reason), ``token_rewards`` (means), ``run``,
        ``shards``. None while other processes are still working.

    Raises:
        UserError: the input is unusable, the output folder holds another run, or no pair can be labelled.
    """
    for name in ("shard_pairs", "max_length", "batch_tokens", "tensor", "pipeline"):
        if getattr(section, name) < 1:
            raise UserError(f"label.{name}={getattr(section, name)} must be at least 1")
    output = Path(section.output)
    tokenizer = load_tokenizer(section.model, section.template or "")
    source = sources_of(section)
    run = fingerprint(section, tokenizer, source)
    share = _share(section)
    if (output / MANIFEST_NAME).exists():
        manifest = read_manifest(output / MANIFEST_NAME, MANIFEST_FORMAT, MANIFEST_VERSION)
        require_own_output(manifest["run"], run, output / MANIFEST_NAME)
        remove_abandoned_locks(output)
        return manifest
    # Read everything once before the first forward pass: a broken record must not surface after hours of scoring.
    drops: Counter[str] = Counter()
    portions = Portions(_read(section, source, drops), section.shard_pairs)
    if portions.all_weigh_nothing and portions.total:
        raise UserError(f"{section.pairs}: the pair_weight of every pair is 0, so that nothing would be trained on")
    shards = Shards(output, run, portions.sha256)
    job = ShardJob(output, SHARD_PATTERN, portions.total, section.shard_pairs, share, shards.is_current)
    shards.require_own(job)
    finished = job.finished()
    # All ranks of a split model must start together.
    needed = job.mine if section.engine == "huggingface" else job.portions
    if any(portion not in finished for portion in needed):
        job.require_free(finished)
        if rank_info().rank == 0:
            for warning in portions.warnings:
                logger.warning("%s: %s", section.pairs, warning)
        _require_renderable(section, job, finished, tokenizer, source)
        scorers = _load_scorers(section, source, tokenizer, scorer)
        with job.progress("label", "pairs", finished) as progress:
            for portion, pairs in job.unfinished(_read(section, source), finished):
                labelled_drops, labelled = _label_portion(pairs, section, tokenizer, source, scorers, progress)
                if share.writes:
                    weighted = any(pair.pair_weight is not None for pair in labelled)
                    write_shard(job.path(portion), labelled, shards.metadata(portion, labelled_drops), weighted)
        if section.engine == "megatron":
            scorers[REFERENCE].close()
    if not share.writes or len(job.finished()) < len(job.portions):
        return None
    return finish(job, drops, run, section)


def _read(section: LabelSection, source: Sources, drops: Counter[str] | None = None) -> Iterator[Pair]:
    if not source.reads_own:
        return read_pairs(section.pairs, drops, Reading.of(section))
    rows = read_pairs_and_rows(section.pairs, drops, Reading.of(section))
    return (dataclasses.replace(pair, own=own) for pair, own in own_columns(rows))


def _require_renderable(
    section: LabelSection,
    job: ShardJob,
    finished: set[int],
    tokenizer: ChatTokenizer,
    source: Sources,
) -> None:
    """Put every pair that this process will label through the chat template, so that a refusal comes first.

    Raises:
        UserError: the template cannot render a pair, or its sampled ids are another tokenizer's; the message names file
            and row.
    """

    def check(pairs: list[Pair]) -> int:
        for pair in pairs:
            _checked_prepare(pair, section, sys.maxsize, tokenizer, source)
        return len(pairs)

    def due() -> Iterator[Pair]:
        for position, pair in enumerate(_read(section, source)):
            portion = position // section.shard_pairs
            if portion in job.share and portion not in finished:
                yield pair

    total = sum(min(job.shard_size, job.total - p * job.shard_size) for p in job.mine if p not in finished)
    workers = min(usable_cores(rank_info().local_size), total // _PAIRS_WORTH_A_PROCESS)
    shown = job.share.writes and job.share.index == 0
    with Progress("check", "pairs", total, shown=shown) as progress:
        for checked in in_order(check, batches(due(), _PAIRS_AT_ONCE), workers):
            progress.skipped(checked)


def _checked_prepare(
    pair: Pair, section: LabelSection, max_revision_length: int, tokenizer: ChatTokenizer, source: Sources
) -> tuple["_Prepared | None", str]:
    try:
        return _prepare(pair, section.max_length, max_revision_length, tokenizer, source)
    except UserError as error:
        raise UserError(f"{section.pairs} row {pair.row}, pair {pair.pair_id}: {error}") from None


def _label_portion(
    pairs: list[Pair],
    section: LabelSection,
    tokenizer: ChatTokenizer,
    source: Sources,
    scorers: dict[str, Scorer],
    progress: Progress,
) -> tuple[dict[str, int], list[LabelledPair]]:
    """Counts of dropped pairs by reason, and the records of a shard."""
    revision_length = section.max_revision_length or scorers[REFERENCE].max_length
    drops: Counter[str] = Counter()
    prepared = []
    for pair in pairs:
        fitting, reason = _checked_prepare(pair, section, revision_length, tokenizer, source)
        if fitting is None:
            drops[reason] += 1
        else:
            prepared.append(fitting)
    progress.skipped(drops.total())
    passes = len(SIDES) * len(scorers)
    done = 0

    def scored(count: int, tokens: int) -> None:
        nonlocal done
        progress.worked((done + count) // passes - done // passes, tokens)
        done += count

    logps = [{side: {} for side in SIDES} for _ in prepared]
    for scorer in dict.fromkeys(scorers.values()):  # each model scores all of its passes together
        names = [name for name, its in scorers.items() if its is scorer]
        places = [(i, side, name) for i in range(len(prepared)) for side in SIDES for name in names]
        found = scorer.score([prepared[i].sequences[side][name] for i, side, name in places], scored)
        for (i, side, name), values in zip(places, found, strict=True):
            logps[i][side][name] = values
    labelled = [_labelled(one, its, section, source) for one, its in zip(prepared, logps, strict=True)]
    return dict(drops), labelled


def _prepare(
    pair: Pair, max_length: int, max_revision_length: int, tokenizer: ChatTokenizer, source: Sources
) -> tuple[_Prepared | None, str]:
    """The sequences of a pair, or None and the reason for dropping it."""
    answers = prompt_answers(pair)
    prompt_ids = tokenizer.encode_prompt(pair.messages, pair.tools, answers)
    if len(prompt_ids) >= max_length:
        return None, PROMPT_FILLS_CONTEXT
    sequences, scored = {}, {}
    for side in SIDES:
        ids, scored[side] = scored_response(pair, side, tokenizer)
        if len(prompt_ids) + len(ids) > max_length:
            return None, TOO_LONG
        prompts = {REFERENCE: prompt_ids, **source.prompts(pair, side, prompt_ids, ids, tokenizer)}
        sequences[side] = {name: ScoredSequence(prompt, ids) for name, prompt in prompts.items()}
        revisions = [len(prompt) for prompt in prompts.values() if prompt is not prompt_ids]
        if max(revisions, default=0) + len(ids) > max_revision_length:
            return None, REVISION_TOO_LONG
    if sequences["chosen"][REFERENCE] == sequences["rejected"][REFERENCE]:
        return None, IDENTICAL_RESPONSES  # they differed only in white space that the template strips
    given = {side: source.given(pair, side, tokenizer) for side in SIDES}
    return _Prepared(pair, sequences, scored, given), ""


def _labelled(
    prepared: _Prepared, logps: dict[str, dict[str, np.ndarray]], section: LabelSection, source: Sources
) -> LabelledPair:
    pair, columns = prepared.pair, {}
    for side in SIDES:
        if not all(np.isfinite(values).all() for values in logps[side].values()):
            raise UserError(
                f"the reference model gives non-finite log-probs for pair {pair.pair_id} "
                f"({side}); its weights are damaged, or it needs --dtype float32"
            )
        sequence = prepared.sequences[side][REFERENCE]
        values = source.rewards(logps[side], prepared.given[side])
        reference, scored = logps[side][REFERENCE], prepared.scored[side]
        for rewards in values.values():
            if not section.reward_eot:
                rewards[_ends(scored)] = 0.0
            if not scored.all():
                rewards[~scored] = NOT_SCORED
        if not scored.all():
            reference = np.where(scored, reference, np.float32(0))
        columns[f"{side}_tokens"] = np.array([*sequence.prompt_ids, *sequence.response_ids], dtype=np.int32)
        columns[f"{side}_token_rewards"] = values.pop(MAIN)
        columns[f"{side}_ref_logprobs"] = reference
        columns[f"{side}_values"] = values
    return labelled_pair(pair, columns)


def _ends(scored: np.ndarray) -> np.ndarray:
    """[n] bool: the last token of each assistant turn."""
    return scored & ~np.append(scored[1:], False)


def _share(section: LabelSection) -> Share:
    here = rank_info()
    if section.engine == "huggingface":
        return Share(here.rank, here.size, True)
    from treg_megatron.labelling.scoring.megatron import replica

    index, count, first = replica(here, section.tensor, section.pipeline)
    return Share(index, count, first)


def _load_scorers(
    section: LabelSection, source: Sources, tokenizer: ChatTokenizer, reference: Scorer | None
) -> dict[str, Scorer]:
    """The model of each pass, each loaded once."""
    own = Model(section.model, section.checkpoint)
    loaded = {own: reference or _load_scorer(section, own)}
    for model in source.models.values():
        if model not in loaded:
            if load_tokenizer(model.folder, section.template or "").sha256 != tokenizer.sha256:
                raise UserError(
                    f"{model.folder} has another tokenizer than {section.model}: their log-probs cannot be compared"
                )
            loaded[model] = _load_scorer(section, model)
    for model, scorer in loaded.items():
        _require_fitting_model(section, model, scorer, tokenizer)
    return {REFERENCE: loaded[own], **{name: loaded[source.models[name]] for name in source.passes}}


def _load_scorer(section: LabelSection, model: Model) -> Scorer:
    if section.engine == "megatron":
        from treg_megatron.labelling.scoring.megatron import MegatronScorer

        scorer = MegatronScorer(model.checkpoint, section.tensor, section.pipeline, section.dtype, section.batch_tokens)
        scorer.require_weights_of(model.folder)
        return scorer
    from treg_megatron.labelling.scoring.huggingface import HuggingFaceScorer

    return HuggingFaceScorer(model.folder, section.dtype, section.device, section.batch_tokens)


def _require_fitting_model(section: LabelSection, model: Model, scorer: Scorer, tokenizer: ChatTokenizer) -> None:
    for name in ("max_length", "max_revision_length"):
        if (getattr(section, name) or 0) > scorer.max_length:
            raise UserError(
                f"label.{name}={getattr(section, name)} exceeds the {scorer.max_length} positions of "
                f"{model.folder}; lower it"
            )
    require_embeddings(tokenizer.vocab_size, scorer.vocab_size, model.folder)
