"""The step ``judge``: a judge's preferences between the answers of an arm and of a baseline, prompt by prompt.

Like sampling, it writes shards atomically, and resumes with the unfinished ones. ``run.json`` is written first and
records what the folder was begun with. Replies of a server are also kept one by one (:mod:`judges.reply_cache`).
"""

import json
from pathlib import Path
from typing import Any

from treg_megatron.config.schema import JudgeSection
from treg_megatron.errors import UserError
from treg_megatron.evaluation.answer_folder import Answers, read_answers
from treg_megatron.evaluation.judges import Judge, Pair
from treg_megatron.evaluation.judgment_folder import FORMAT, SHARD_PATTERN, VERSION, read_shard
from treg_megatron.utils.files import atomic_write, sha256_of, sha256_of_json, write_manifest
from treg_megatron.utils.lock import Lock
from treg_megatron.utils.shard_job import RUN_NAME, ShardJob, require_folder_of_run

_NAMED = 3  # prompts in a message


def judge(section: JudgeSection) -> dict[str, Any]:
    """Judge the answers ``section.arm`` against ``section.baseline``, or resume where an earlier call stopped.

    Returns:
        The manifest of ``section.output``; :mod:`treg_megatron.evaluation.judgment_folder` describes the folder.

    Raises:
        UserError: the two sides do not belong together, the settings are unusable, the output folder was begun with
            others, or the judge cannot go on.
    """
    _require_sensible(section)
    with Lock(section.output):
        return _judge(section)


def _judge(section: JudgeSection) -> dict[str, Any]:
    output = Path(section.output)
    arm, baseline = read_answers(section.arm), read_answers(section.baseline)
    pairs = matched(arm, baseline)
    chosen = _chosen_judge(section, arm, baseline)
    chosen.require_readable(pairs)
    sides = {"arm": _described(arm), "baseline": _described(baseline)}
    run = {
        **{name: {key: side[key] for key in ("name", "sha256")} for name, side in sides.items()},
        "judge": chosen.identity(),
        "shard_prompts": section.shard_prompts,
    }
    require_folder_of_run(output, FORMAT, VERSION, run, "judgments", "judge.output")
    job = ShardJob(output, SHARD_PATTERN, len(pairs), section.shard_prompts)
    finished = job.finished()
    if len(finished) < len(job.portions):
        write_manifest(output / RUN_NAME, FORMAT, VERSION, {"run": run})
        tokens = _tokens_by_prompt(arm, baseline)
        proven = any(_holds_a_verdict(read_shard(job.path(portion))) for portion in finished)
        with chosen, job.progress("judge", "prompts", finished) as progress:
            for portion, part in job.unfinished(pairs, finished):
                rows = []
                for row in chosen.judgments(part):
                    rows.append(row)
                    progress.worked(1, tokens[row["prompt_id"]])
                proven = proven or _holds_a_verdict(rows)
                if not proven:
                    _refuse_without_a_verdict(rows)
                with atomic_write(job.path(portion)) as partial:
                    partial.write_text(
                        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
                    )
    rows = [row for path in job.paths for row in read_shard(path)]
    for name, text in chosen.files(pairs, rows).items():
        with atomic_write(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    failed = sum(row["preference"] is None for row in rows)
    return job.finish(
        FORMAT,
        VERSION,
        {
            "benchmark": arm.benchmark,
            **sides,
            "judge": run["judge"],
            "prompts": len(rows),
            "prompts_sha256": arm.prompts_sha256,
            "judged": len(rows) - failed,
            "failed": failed,
            "shards": [path.name for path in job.paths],
            "run": run,
        },
    )


def matched(arm: Answers, baseline: Answers) -> list[Pair]:
    """The answers of both sides to each prompt, in the arm's order.

    Raises:
        UserError: they answer different prompts; the first of them are named.
    """
    of_baseline = {row["prompt_id"]: row for row in baseline.rows}
    of_arm = {row["prompt_id"] for row in arm.rows}
    for lacking, ids in (
        (baseline, [row["prompt_id"] for row in arm.rows if row["prompt_id"] not in of_baseline]),
        (arm, [row["prompt_id"] for row in baseline.rows if row["prompt_id"] not in of_arm]),
    ):
        if ids:
            raise UserError(
                f"{lacking.folder} lacks answers to {len(ids)} prompts that the other side answers, such as "
                f"{', '.join(ids[:_NAMED])}: both must answer the same prompts"
            )
    different = [row["prompt_id"] for row in arm.rows if row["messages"] != of_baseline[row["prompt_id"]]["messages"]]
    if different:
        raise UserError(
            f"{arm.folder} and {baseline.folder} have other texts for {len(different)} prompts of the same id, such as "
            f"{', '.join(different[:_NAMED])}: both must answer the same prompts"
        )
    pairs = []
    for row in arm.rows:
        other = of_baseline[row["prompt_id"]]
        mine, others = ([answer["text"] for answer in side["answers"]] for side in (row, other))
        if len(mine) != len(others):
            raise UserError(
                f"prompt {row['prompt_id']} has {len(mine)} answers in {arm.folder} and {len(others)} in "
                f"{baseline.folder}: both must answer as many turns"
            )
        category, dataset = (row[name] if row[name] is not None else other[name] for name in ("category", "dataset"))
        pairs.append(Pair(row["prompt_id"], row["messages"], mine, others, category, dataset))
    return pairs


def _chosen_judge(section: JudgeSection, arm: Answers, baseline: Answers) -> Judge:
    if section.kind in ("reward_model", "function"):
        from treg_megatron.evaluation.judges.scores import ScoreJudge

        if getattr(section, section.kind) is None:
            raise UserError(f"judge.kind is {section.kind}, but judge.{section.kind} has no value")
        return ScoreJudge(section)
    if section.kind == "arena_hard":
        from treg_megatron.evaluation.judges.arena_hard import ArenaHardJudge

        return ArenaHardJudge(section, arm.benchmark, arm.name, baseline.name)
    from treg_megatron.evaluation.judges.alpaca_eval import AlpacaEvalJudge

    return AlpacaEvalJudge(section, arm.name, baseline.name)


def _described(side: Answers) -> dict[str, Any]:
    """The entry of one side in the manifest."""
    files = [side.folder] if side.manifest is None else [side.folder / name for name in side.manifest["shards"]]
    return {
        "name": side.name,
        "answers": str(side.folder),
        "sha256": sha256_of_json([sha256_of(file) for file in files]),
        "settings": side.settings,
        "mean_tokens": side.mean_tokens,
        "mean_characters": side.mean_characters,
        "truncated": side.truncated,
    }


def _tokens_by_prompt(*sides: Answers) -> dict[str, int]:
    """Tokens of both answers to each prompt, as far as they are known."""
    tokens: dict[str, int] = {}
    for side in sides:
        for row in side.rows:
            known = sum(answer["tokens"] or 0 for answer in row["answers"])
            tokens[row["prompt_id"]] = tokens.get(row["prompt_id"], 0) + known
    return tokens


def _require_sensible(section: JudgeSection) -> None:
    for name in ("verdict_attempts", "concurrency", "max_attempts", "shard_prompts"):
        if getattr(section, name) < 1:
            raise UserError(f"judge.{name}={getattr(section, name)} must be at least 1")
    if section.max_tokens is not None and section.max_tokens < 1:
        raise UserError(f"judge.max_tokens={section.max_tokens} must be at least 1, or null")
    if not section.temperature >= 0 or not section.timeout > 0:
        raise UserError(
            f"judge.temperature={section.temperature} must not be negative, and judge.timeout={section.timeout} must "
            "be positive"
        )


def _holds_a_verdict(rows: list[dict[str, Any]]) -> bool:
    return any(row["preference"] is not None for row in rows)


def _refuse_without_a_verdict(rows: list[dict[str, Any]]) -> None:
    """Stop a judge that has failed on its first shard, before more is paid for replies that cannot be read."""
    replies = [order["reply"] for order in rows[0]["orders"] if order["preference"] is None]
    raise UserError(
        f"the judge gave no verdict on any of the first {len(rows)} prompts; to {rows[0]['prompt_id']} it said: "
        f"{' '.join(replies[0].split())[:200] or 'nothing that can be read'}"
    )
