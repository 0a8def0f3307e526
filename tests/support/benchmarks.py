"""Prompts in the forms of benchmarks, small, and the recipe section that answers them."""

import json
from pathlib import Path
from typing import Any

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.config.schema import EvaluateSection

ALPACA_EVAL = [{"instruction": f"Question {i}?" + " Why?" * i, "dataset": f"set {i % 2}"} for i in range(7)]
ARENA_HARD_V1 = [
    {"uid": f"{7 - i:032x}", "category": "arena-hard-v0.1", "cluster": "C", "prompt": f"Task {i}."} for i in range(3)
]
ARENA_HARD_V2 = [
    {"uid": f"{i:016x}", "category": category, "subcategory": "coding", "prompt": f"Task {i}."}
    for i, category in enumerate(("hard_prompt", "creative_writing"))
]
MT_BENCH = [
    {"question_id": 100 - i, "category": category, "turns": [f"Begin {i}.", f"Go on with {i}."]}
    for i, category in enumerate(("writing", "math", "stem", "coding", "unheard of"))
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A JSON list for a name that ends in .json, otherwise JSONL."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def evaluate_section(model: Path, prompts: Path, output: Path, *overrides: str) -> EvaluateSection:
    """Settings for a tiny model on a CPU: short answers, portions of two prompts."""
    return section(
        load_recipe(
            overrides=[
                f"evaluate.model={model}",
                f"evaluate.prompts={prompts}",
                f"evaluate.output={output}",
                *("evaluate.name=arm", "evaluate.dtype=float32", "evaluate.device=cpu"),
                *("evaluate.max_new_tokens=6", "evaluate.shard_prompts=2", "evaluate.batch_prompts=2"),
                *overrides,
            ]
        ),
        "evaluate",
    )
