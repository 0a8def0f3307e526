"""The ``sample`` step: several responses to each prompt, grouped by prompt id.

Like labelling, it writes shards atomically, one JSONL file each, and resumes with the unfinished ones. ``run.json`` is
written first and records which run the folder belongs to.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from treg_megatron.config.schema import SampleSection
from treg_megatron.data.records import read_rows, source_identity
from treg_megatron.errors import UserError
from treg_megatron.formats.fields import prompt as conversation
from treg_megatron.sampling import Sampler
from treg_megatron.sampling.decoding import Decoding, seed_from
from treg_megatron.sampling.engines import load_sampler
from treg_megatron.tokenizer.chat import ChatTokenizer, load_tokenizer
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils.files import atomic_write, sha256_of_json, write_manifest
from treg_megatron.utils.lock import Lock
from treg_megatron.utils.progress import Progress
from treg_megatron.utils.shard_job import RUN_NAME, ShardJob, require_folder_of_run

FORMAT, VERSION = "treg-megatron samples", 1
SHARD_PATTERN = "samples-{:05d}.jsonl"
PROMPT_TOO_LONG = "prompt is longer than max_prompt_length"
REPEATED_PROMPT = "repeats an earlier prompt"


class Prompt(NamedTuple):
    """A conversation that ends with a user turn."""

    prompt_id: str
    messages: tuple[Message, ...]


def sample(section: SampleSection, sampler: Sampler | None = None) -> dict[str, Any]:
    """Sample responses into the folder ``section.output``, or resume where an earlier call stopped.

    Each output record has ``prompt_id``, ``messages``, ``tokenizer`` (hash) and ``responses``; each response has
    ``seed``, ``text``, ``ids`` (or null) and ``finished``.

    Args:
        section: the ``sample`` settings of the run.
        sampler: the model; by default ``section.engine`` loads it.

    Returns:
        The manifest: ``prompts``, ``responses``, ``truncated`` (numbers), ``drops`` (counts by reason), ``run``,
        ``shards``.

    Raises:
        UserError: the input or settings are unusable, the output folder holds another run, or the server is down.
    """
    _require_sensible(section)
    with Lock(section.output):
        return _sample(section, sampler)


def _sample(section: SampleSection, sampler: Sampler | None) -> dict[str, Any]:
    output = Path(section.output)
    tokenizer = load_tokenizer(section.model, section.template or "")
    drops: Counter[str] = Counter()
    prompts = list(read_prompts(section.prompts, drops))
    run = {
        "prompts": source_identity(section.prompts),
        "tokenizer": tokenizer.identity,
        "model": Path(section.model).resolve().name,
        **{
            name: getattr(section, name)
            for name in (
                "engine",
                "seeds",
                "temperature",
                "top_p",
                "max_new_tokens",
                "max_prompt_length",
                "batch_prompts",
                "shard_prompts",
                "dtype",
            )
        },
    }
    require_folder_of_run(output, FORMAT, VERSION, run, "samples", "sample.output")
    job = ShardJob(output, SHARD_PATTERN, len(prompts), section.shard_prompts)
    finished = job.finished()
    if len(finished) < len(job.portions):
        sampler = sampler or load_sampler(section, tokenizer, "sample")
        write_manifest(output / RUN_NAME, FORMAT, VERSION, {"run": run})
        with job.progress("sample", "prompts", finished) as progress:
            for portion, part in job.unfinished(prompts, finished):
                rows = _sample_part(part, section, tokenizer, sampler, progress)
                with atomic_write(job.path(portion)) as partial:
                    partial.write_text(
                        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
                    )
    return _finish(job, drops, run)


def read_prompts(path: str | Path, drops: Counter[str]) -> Iterator[Prompt]:
    """Read the prompts of a source (:mod:`treg_megatron.data.records`): its ``prompt`` or ``messages``.

    Everything after the last user turn is dropped, so that conversations and preference pairs work as well. The id is
    the record's ``prompt_id``, ``pair_id`` or ``id``, otherwise a hash of the prompt.

    Raises:
        UserError: a record has no prompt, two different prompts have the same id, or the file holds no prompts.
    """
    by_id: dict[str, str] = {}
    seen: set[str] = set()
    for number, row in read_rows(path):
        try:
            messages = _messages(row)
            content = sha256_of_json([message.as_list() for message in messages])
            given = next((row[name] for name in ("prompt_id", "pair_id", "id") if row.get(name) is not None), None)
            prompt_id = content[:16] if given is None else str(given)
            if by_id.setdefault(prompt_id, content) != content:
                raise ValueError(f"prompt_id {prompt_id!r} already belongs to an earlier, different prompt")
        except ValueError as error:
            raise UserError(f"{path} row {number}: {error}") from None
        if content in seen:
            drops[REPEATED_PROMPT] += 1
            continue
        seen.add(content)
        yield Prompt(prompt_id, messages)
    if not seen:
        raise UserError(f"{path} holds no prompts")


def _messages(row: Any) -> tuple[Message, ...]:
    value = row.get("prompt", row.get("messages")) if isinstance(row, dict) else None
    if value is None:
        raise ValueError("needs `prompt` (text or messages) or `messages`")
    messages = conversation(value)
    while messages and messages[-1].role != "user":
        messages = messages[:-1]
    if not messages or not messages[-1].content.strip():
        raise ValueError("the prompt has no user turn, or an empty one")
    return messages


def _require_sensible(section: SampleSection) -> None:
    for name in ("max_new_tokens", "max_prompt_length", "batch_prompts", "shard_prompts", "max_attempts"):
        if getattr(section, name) < 1:
            raise UserError(f"sample.{name}={getattr(section, name)} must be at least 1")
    if not section.temperature >= 0 or not 0 < section.top_p <= 1:
        raise UserError(
            f"sample.temperature={section.temperature} must not be negative, and sample.top_p={section.top_p} must lie "
            "in (0, 1]"
        )
    if len(set(section.seeds)) != len(section.seeds) or not section.seeds:
        raise UserError(
            f"sample.seeds={list(section.seeds)} must be one or more distinct numbers; a preference pair "
            "needs at least two"
        )


def _sample_part(
    part: list[Prompt], section: SampleSection, tokenizer: ChatTokenizer, sampler: Sampler, progress: Progress
) -> list[dict[str, Any]]:
    ids = [tokenizer.encode_prompt(prompt.messages) for prompt in part]
    kept = [i for i, prompt in enumerate(ids) if len(prompt) <= section.max_prompt_length]
    progress.skipped(len(part) - len(kept))
    # batch prompts of similar length, to keep padding small
    kept.sort(key=lambda i: len(ids[i]))
    responses: dict[int, list[dict[str, Any]]] = {i: [] for i in kept}
    decoding = Decoding(section.temperature, section.top_p, section.max_new_tokens)
    for start in range(0, len(kept), section.batch_prompts):
        batch = kept[start : start + section.batch_prompts]
        tokens = 0
        for seed in section.seeds:
            # include the batch in the seed: otherwise similar prompts in different batches get the same random numbers
            drawn = seed_from(f"{seed} {part[batch[0]].prompt_id}")
            for i, sampled in zip(batch, sampler.sample([ids[i] for i in batch], drawn, decoding), strict=True):
                responses[i].append({"seed": seed, **sampled._asdict()})
                tokens += len(sampled.ids or [])
        progress.worked(len(batch), tokens)
    return [
        {
            "prompt_id": part[i].prompt_id,
            "messages": [m.as_dict() for m in part[i].messages],
            "tokenizer": tokenizer.sha256,
            "responses": responses[i],
        }
        for i in sorted(kept)
    ]


def _finish(job: ShardJob, drops: Counter[str], run: dict) -> dict[str, Any]:
    rows = [row for path in job.paths for _, row in (read_rows(path) if path.stat().st_size else ())]
    if not rows:
        raise UserError(f"no prompt is left to answer: {job.total} {PROMPT_TOO_LONG}")
    responses = [response for row in rows for response in row["responses"]]
    if job.total > len(rows):
        drops[PROMPT_TOO_LONG] += job.total - len(rows)
    return job.finish(
        FORMAT,
        VERSION,
        {
            "prompts": len(rows),
            "responses": len(responses),
            "truncated": sum(not response["finished"] for response in responses),
            "drops": dict(sorted(drops.items())),
            "run": run,
            "shards": [path.name for path in job.paths],
        },
    )
