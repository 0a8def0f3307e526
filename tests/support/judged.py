"""Judgments as files: folders of ``treg judge``, alpaca_eval's annotations and Arena-Hard's judgments."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from treg_megatron.evaluation.answer_folder import prompt_hash, prompts_hash
from treg_megatron.evaluation.judgment_folder import FORMAT, SHARD_PATTERN, VERSION
from treg_megatron.utils.files import write_manifest

BASELINE = "base"


def annotations(name: str, preferences: Sequence[float | None], lengths: Sequence[int] | None = None) -> list[dict]:
    """alpaca_eval's annotations; ``preferences`` in its scale, ``lengths`` of the arm's answers in characters."""
    return [
        {
            "instruction": f"Question {number}?",
            "output_1": "b" * 50,
            "generator_1": BASELINE,
            "output_2": "a" * (lengths[number] if lengths else 40 + number % 7),
            "generator_2": name,
            "annotator": "rule",
            "preference": preference,
        }
        for number, preference in enumerate(preferences)
    ]


def arena_hard(name: str, verdicts: Sequence[tuple[str | None, str | None]], **more: Any) -> list[dict]:
    """Arena-Hard's judgments from the verdicts of both games; the baseline's answer comes first in the first."""
    return [
        {
            "uid": f"{number:032x}",
            "model": name,
            "judge": "rule",
            "games": [{"score": verdict} for verdict in both],
            **more,
        }
        for number, both in enumerate(verdicts)
    ]


def as_jsonl(rows: Sequence[dict], path: Path) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def judgments_folder(
    folder: Path,
    name: str,
    preferences: Sequence[float | None],
    orders: Sequence[list[dict]] | None = None,
    answers: Path | None = None,
    **changes: Any,
) -> Path:
    """A finished folder of ``treg judge``; ``changes`` replace entries of its manifest."""
    prompts = [
        {"prompt_id": prompt_hash(messages), "messages": messages}
        for messages in ([{"role": "user", "content": f"Question {number}?"}] for number in range(len(preferences)))
    ]
    folder.mkdir(parents=True)
    rows = [
        {
            "prompt_id": prompt["prompt_id"],
            "preference": preference,
            "arm_score": None,
            "baseline_score": None,
            "orders": orders[number] if orders else [],
        }
        for number, (prompt, preference) in enumerate(zip(prompts, preferences))
    ]
    as_jsonl(rows, folder / SHARD_PATTERN.format(0))
    side = {
        "name": name,
        "answers": str(answers or folder / "no_answers"),
        "sha256": "of " + name,
        "settings": {"temperature": 0.0},
        "mean_tokens": 12.5,
        "mean_characters": 43.0,
        "truncated": 1,
    }
    manifest = {
        "benchmark": "alpaca_eval",
        "arm": side,
        "baseline": {**side, "name": BASELINE, "sha256": "of the baseline"},
        "judge": {"kind": "reward_model", "name": "rule", "revision": "1"},
        "prompts": len(rows),
        "prompts_sha256": prompts_hash(prompts),
        "judged": sum(preference is not None for preference in preferences),
        "failed": sum(preference is None for preference in preferences),
        "shards": [SHARD_PATTERN.format(0)],
        "run": {},
    }
    write_manifest(folder / "manifest.json", FORMAT, VERSION, {**manifest, **changes})
    return folder
