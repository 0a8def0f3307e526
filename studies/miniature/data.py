"""Input files of the study: the prompts of each split and the references' training data."""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from studies.miniature.model import END, vocabulary
from studies.miniature.world import FILLERS, Task, Writer, task_of, verify
from treg_megatron.labelling.prompt_pair import PromptPair
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils.files import atomic_write

#: the annotators of the references' training data: everyday answers, and the two kinds of revision
EVERYDAY, BETTER, WORSE = Writer(error_rate=None, filler_rate=0.15), Writer(0.0, 0.0), Writer(0.8, 0.5)


def write_records(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a JSONL file atomically."""
    with atomic_write(path) as partial:
        partial.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """All records of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def prompt_records(name: str, tasks: list[Task]) -> list[dict[str, Any]]:
    """Prompts in the format of ``tools/sample_responses.py``."""
    return [{"prompt_id": f"{name}-{i}", "prompt": task.prompt} for i, task in enumerate(tasks)]


def reference_records(tasks: list[Task], examples: int, forms: Sequence[PromptPair], seed: int) -> list[dict[str, Any]]:
    """Training data of a reference: half everyday answers, half revisions of such answers to better or worse ones.

    The revisions are asked for in each of the forms equally often.

    The records are preference pairs for ``objective.loss_type=sft``, which learns the chosen response; the rejected one
    is a placeholder.
    """
    draw = random.Random(f"reference {seed}")
    records = []
    for i in range(examples):
        task = draw.choice(tasks)
        messages, answer = [Message("user", task.prompt)], EVERYDAY.answer(task, draw)
        kind, form = draw.choice(("everyday", "everyday", "better", "worse")), draw.choice(forms)
        if kind == "better":
            messages, answer = form.better(messages, answer), BETTER.answer(task, draw)
        elif kind == "worse":
            messages, answer = form.worse(messages, answer), WORSE.answer(task, draw)
        records.append(
            {
                "pair_id": f"{kind}-{i}",
                "prompt": [message.as_dict() for message in messages],
                "chosen": answer,
                "rejected": FILLERS[0],
                "chosen_spans": [],
                "rejected_spans": [],
            }
        )
    return records


def truth_records(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ranked pairs with the verifier's marks as token rewards, 0.5 for right and -0.5 for wrong tokens.

    In the format of ``tools/import_rewards.py``.
    """
    return [
        record
        | {
            f"{side}_token_rewards": [0.5 if right else -0.5 for right in marks(record, side)]
            for side in ("chosen", "rejected")
        }
        | {f"{side}_token_ids": record[f"{side}_ids"] for side in ("chosen", "rejected")}
        for record in pairs
    ]


def marks(record: dict[str, Any], side: str) -> list[bool]:
    """The verifier's mark of each token id of a ranked response, including the end token unless it was cut off."""
    words = [vocabulary()[i] for i in record[f"{side}_ids"]]
    ended = words[-1] == END
    verdict = verify(task_of(record["prompt"][-1]["content"]), " ".join(words[:-1] if ended else words))
    return [*verdict.right, verdict.end_is_right] if ended else verdict.right
