"""The ``answers`` step: a model's answers to the prompts of a benchmark.

Like labelling, it writes shards atomically and resumes with the unfinished ones; any number of processes share them. A
shard's answers are a function of its prompts, the model and the settings, so they do not depend on who makes them.
"""

import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from treg_megatron.config.schema import EvaluateSection
from treg_megatron.data.records import read_rows, source_identity
from treg_megatron.distributed.launch import rank_info
from treg_megatron.errors import UserError
from treg_megatron.evaluation.answer_folder import FORMAT, SHARD_PATTERN, VERSION, Answers, prompts_hash
from treg_megatron.evaluation.answering.benchmarks import BenchmarkPrompt, read_benchmark, write_benchmark_file
from treg_megatron.evaluation.answering.presets import AnswerSettings, answer_settings
from treg_megatron.evaluation.arm import hugging_face_folder, model_name, require_name
from treg_megatron.sampling import Sampler
from treg_megatron.sampling.decoding import Decoding, seed_from
from treg_megatron.sampling.engines import load_sampler
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer
from treg_megatron.tokenizer.conversation import Sampled
from treg_megatron.utils.files import atomic_write, read_json, read_manifest, write_manifest
from treg_megatron.utils.lock import Held, Lock, remove_abandoned_locks
from treg_megatron.utils.progress import Progress
from treg_megatron.utils.shard_job import MANIFEST_NAME, RUN_NAME, ShardJob, Share, require_folder_of_run

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 0.05
_SOME_ANSWER = "x"  # stands for an answer that is not known yet


@dataclass(frozen=True)
class _Due:
    """A turn that waits for its answer."""

    position: int
    prompt_ids: list[int]
    decoding: Decoding


@dataclass(frozen=True)
class _Arm:
    """What answers, but for the weights.

    Attributes:
        context: the model's positions; None where no config.json tells them.
    """

    tokenizer: ChatTokenizer
    settings: AnswerSettings
    context: int | None
    batch_prompts: int
    seed: int

    def due(self, position: int, prompt: BenchmarkPrompt, answers: Sequence[str]) -> _Due:
        """The turn of a prompt after the given answers; ``max_new_tokens`` is what the model has positions for."""
        try:
            ids = self.tokenizer.encode_prompt(prompt.conversation(answers))
        except UserError as error:
            raise UserError(f"prompt {prompt.prompt_id}: {error}") from None
        decoding = self.settings.decoding(prompt.category, self.tokenizer)
        if self.context is not None:
            decoding = decoding._replace(max_new_tokens=min(decoding.max_new_tokens, self.context - len(ids)))
        return _Due(position, ids, decoding)


def answers(section: EvaluateSection, sampler: Sampler | None = None) -> dict[str, Any] | None:
    """Answer ``section.prompts`` into the folder ``section.output``, or resume where an earlier call stopped.

    Under torchrun or srun each process answers its share. What the folder holds is described in
    :mod:`treg_megatron.evaluation.answer_folder`.

    Args:
        section: the ``evaluate`` settings of the run.
        sampler: the model; by default ``section.engine`` loads it.

    Returns:
        The manifest; None while other processes are still working.

    Raises:
        UserError: the input or settings are unusable, the output folder holds another run, or the server is down.
    """
    for key in ("batch_prompts", "shard_prompts", "max_attempts"):
        if getattr(section, key) < 1:
            raise UserError(f"evaluate.{key}={getattr(section, key)} must be at least 1")
    folder, output = hugging_face_folder(section.model), Path(section.output)
    section = replace(section, model=str(folder))
    tokenizer = load_tokenizer(folder)
    settings = answer_settings(section, folder, tokenizer)
    name = require_name(section.name or model_name(folder), "evaluate.name")
    prompts = read_benchmark(section.prompts, section.benchmark)
    run = _fingerprint(section, settings, name, tokenizer)
    _require_own_output(output, run)
    if (output / MANIFEST_NAME).exists():
        remove_abandoned_locks(output)
        return read_manifest(output / MANIFEST_NAME, FORMAT, VERSION)
    here = rank_info()
    job = ShardJob(output, SHARD_PATTERN, len(prompts), section.shard_prompts, Share(here.rank, here.size))
    finished = job.finished()
    if any(portion not in finished for portion in job.mine):
        job.require_free(finished)
        arm = _Arm(tokenizer, settings, _positions(folder), section.batch_prompts, section.seed)
        _require_answerable(job, finished, prompts, arm)
        if here.rank == 0:
            logger.info("preset %s:\n%s", settings.preset, settings.described())
        sampler = sampler or load_sampler(section, tokenizer, "evaluate")
        _claim(output, run)
        with job.progress("answers", "prompts", finished) as progress:
            for portion, part in job.unfinished(prompts, finished):
                rows = _answer_portion(part, arm, sampler, progress)
                with atomic_write(job.path(portion)) as partial:
                    partial.write_text(
                        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
                    )
    if len(job.finished()) < len(job.portions):
        return None
    return _finish(job, section.benchmark, name, settings, run)


def _fingerprint(
    section: EvaluateSection, settings: AnswerSettings, name: str, tokenizer: ChatTokenizer
) -> dict[str, Any]:
    """Everything that decides the answers, for ``run.json``."""
    model: dict[str, Any]
    if section.engine == "server":
        model = {"server_model": section.server_model}
    else:
        from treg_megatron.models.huggingface import model_identity

        model = model_identity(section.model)
    keys = ("benchmark", "engine", "seed", "batch_prompts", "shard_prompts", "dtype")
    return {
        "prompts": source_identity(section.prompts),
        "name": name,
        "model": model,
        "tokenizer": tokenizer.identity,
        "settings": settings.as_dict(),
        **{key: getattr(section, key) for key in keys},
    }


def _require_own_output(output: Path, run: dict[str, Any]) -> None:
    require_folder_of_run(output, FORMAT, VERSION, run, "answers", "evaluate.output", shared=True)


def _claim(output: Path, run: dict[str, Any]) -> None:
    """Write ``run.json``, unless another process of the job has just done so.

    Raises:
        UserError: another run did.
    """
    while not (output / RUN_NAME).exists():
        try:
            with Lock(output / RUN_NAME):
                if not (output / RUN_NAME).exists():
                    write_manifest(output / RUN_NAME, FORMAT, VERSION, {"run": run})
        except Held:
            time.sleep(_RETRY_SECONDS)
    _require_own_output(output, run)


def _positions(folder: Path) -> int | None:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return config.get("max_position_embeddings")


def _require_answerable(job: ShardJob, finished: set[int], prompts: Sequence[BenchmarkPrompt], arm: _Arm) -> None:
    """Put every prompt that this process will answer through the chat template, so that a refusal comes first.

    Raises:
        UserError: the template cannot render one, or the model has no position left for an answer.
    """
    for portion in job.mine:
        if portion in finished:
            continue
        for prompt in prompts[portion * job.shard_size : (portion + 1) * job.shard_size]:
            for turn in range(len(prompt.turns)):
                due = arm.due(0, prompt, [_SOME_ANSWER] * turn)
                if due.decoding.max_new_tokens < 1:
                    raise UserError(
                        f"prompt {prompt.prompt_id} has {len(due.prompt_ids)} tokens: the model's {arm.context} "
                        "positions leave no room for an answer"
                    )


def _answer_portion(
    part: Sequence[BenchmarkPrompt], arm: _Arm, sampler: Sampler, progress: Progress
) -> list[dict[str, Any]]:
    """The rows of a shard."""
    answered: list[list[Sampled]] = [[] for _ in part]
    for turn in range(max(len(prompt.turns) for prompt in part)):
        waiting = [
            arm.due(i, prompt, [answer.text for answer in answered[i]])
            for i, prompt in enumerate(part)
            if turn < len(prompt.turns)
        ]
        for batch in _batches(waiting, arm.batch_prompts):
            # include the batch in the seed: otherwise similar prompts in different batches get the same random numbers
            seed = seed_from(f"{arm.seed} {turn} {part[batch[0].position].prompt_id}")
            for due, sampled in zip(batch, _sample(sampler, batch, seed), strict=True):
                # alpaca_eval and FastChat, too, keep no white space around an answer
                answered[due.position].append(sampled._replace(text=sampled.text.strip()))
            ended = [due for due in batch if turn + 1 == len(part[due.position].turns)]
            progress.worked(len(ended), sum(len(answered[due.position][-1].ids or ()) for due in batch))
    return [_row(prompt, sampled) for prompt, sampled in zip(part, answered, strict=True)]


def _batches(waiting: Sequence[_Due], size: int) -> Iterator[list[_Due]]:
    """Turns of one decoding and similar lengths, to keep padding small."""
    batch: list[_Due] = []
    for due in sorted(waiting, key=lambda due: (due.decoding, len(due.prompt_ids), due.position)):
        if batch and (len(batch) == size or due.decoding != batch[0].decoding):
            yield batch
            batch = []
        batch.append(due)
    yield batch


def _sample(sampler: Sampler, batch: Sequence[_Due], seed: int) -> list[Sampled]:
    if batch[0].decoding.max_new_tokens < 1:  # earlier answers took all positions
        return [Sampled("", [], False) for _ in batch]
    return sampler.sample([due.prompt_ids for due in batch], seed, batch[0].decoding)


def _row(prompt: BenchmarkPrompt, answers: Sequence[Sampled]) -> dict[str, Any]:
    return {
        "prompt_id": prompt.prompt_id,
        "messages": [message.as_dict() for message in prompt.messages],
        "answers": [
            {**answer._asdict(), "tokens": None if answer.ids is None else len(answer.ids)} for answer in answers
        ],
        "category": prompt.category,
        "dataset": prompt.dataset,
    }


def _finish(job: ShardJob, benchmark: str, name: str, settings: AnswerSettings, run: dict[str, Any]) -> dict[str, Any]:
    """Write the benchmark's file and the manifest, unless another process of the job has just done so."""
    while not (job.output / MANIFEST_NAME).exists():
        try:
            with Lock(job.output / "benchmark"):
                rows, times = [], []
                for path in job.paths:
                    shard = [row for _, row in read_rows(path)]
                    rows += shard
                    times += [path.stat().st_mtime] * len(shard)
                files = write_benchmark_file(job.output, benchmark, name, rows, times)
                found = Answers(name, benchmark, rows, settings.as_dict(), prompts_hash(rows), job.output, None)
                content = {
                    "name": name,
                    "benchmark": benchmark,
                    "prompts": len(rows),
                    "prompts_sha256": found.prompts_sha256,
                    "settings": found.settings,
                    "preset": {"name": settings.preset, "sources": settings.sources},
                    "truncated": found.truncated,
                    "mean_tokens": found.mean_tokens,
                    "mean_characters": found.mean_characters,
                    "shards": [path.name for path in job.paths],
                    "files": files,
                    "run": run,
                }
                job.finish(FORMAT, VERSION, content)
        except Held:
            time.sleep(_RETRY_SECONDS)
    return read_manifest(job.output / MANIFEST_NAME, FORMAT, VERSION)
