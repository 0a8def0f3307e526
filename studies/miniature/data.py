"""The study's input files: prompts of each split, and what the reference learns from."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studies.miniature.model import END, vocabulary
from studies.miniature.world import FILLERS, Task, Writer, task_of, verify
from treg_megatron.labelling.prompt_pair import PromptPair
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils.files import atomic_write

#: who answers what the reference learns from: people as they are, and the two kinds of revision
EVERYDAY, BETTER, WORSE = Writer(error_rate=None, filler_rate=0.15), Writer(0.0, 0.0), Writer(0.8, 0.5)


def write_records(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSONL, whole or not at all."""
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def prompt_records(name: str, tasks: list[Task]) -> list[dict[str, Any]]:
    """Prompts as ``tools/sample_responses.py`` reads them."""
    return [{"prompt_id": f"{name}-{i}", "prompt": task.prompt} for i, task in enumerate(tasks)]


def reference_records(tasks: list[Task], examples: int, pair: PromptPair, seed: int) -> list[dict[str, Any]]:
    """What the reference learns: half everyday answers, half revisions of them, for better and for worse.

    Preference pairs for ``objective.loss_type=sft``, which learns the chosen response; the rejected is a stand-in.
    """
    draw = random.Random(f"reference {seed}")
    rows = []
    for i in range(examples):
        task = draw.choice(tasks)
        messages, answer = [Message("user", task.prompt)], EVERYDAY.answer(task, draw)
        kind = draw.choice(("everyday", "everyday", "better", "worse"))
        if kind == "better":
            messages, answer = pair.better(messages, answer), BETTER.answer(task, draw)
        elif kind == "worse":
            messages, answer = pair.worse(messages, answer), WORSE.answer(task, draw)
        rows.append(
            {
                "pair_id": f"{kind}-{i}",
                "prompt": [message._asdict() for message in messages],
                "chosen": answer,
                "rejected": FILLERS[0],
                "chosen_spans": [],
                "rejected_spans": [],
            }
        )
    return rows


def truth_records(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ranked pairs with the verifier's marks for token rewards, 0.5 right, -0.5 wrong: for ``import_rewards.py``."""
    return [
        row
        | {
            f"{side}_token_rewards": [0.5 if right else -0.5 for right in marks(row, side)]
            for side in ("chosen", "rejected")
        }
        | {f"{side}_token_ids": row[f"{side}_ids"] for side in ("chosen", "rejected")}
        for row in pairs
    ]


def marks(row: dict[str, Any], side: str) -> list[bool]:
    """The verifier's marks of a ranked response, one an id. An answer that was cut off has no end."""
    words = [vocabulary()[i] for i in row[f"{side}_ids"]]
    ended = words[-1] == END
    verdict = verify(task_of(row["prompt"][-1]["content"]), " ".join(words[:-1] if ended else words))
    return [*verdict.right, verdict.end_is_right] if ended else verdict.right
