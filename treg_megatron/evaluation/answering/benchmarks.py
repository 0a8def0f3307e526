"""Prompts and answer files of benchmarks, as the benchmarks' own tools write and read them.

AlpacaEval    prompts: a JSON list of {instruction, dataset, ...}
              alpaca_eval.json: a list of {dataset, instruction, output, generator} (alpaca_eval 0.6.6)
Arena-Hard    prompts: question.jsonl of {uid, category, prompt, ...}
              model_answer/NAME.jsonl of {uid, ans_id, model, messages, tstamp}; the last message's content is
              {answer} (arena-hard-auto, gen_answer.py)
MT-Bench      prompts: question.jsonl of {question_id, category, turns, ...}
              model_answer/NAME.jsonl of {question_id, answer_id, model_id, choices: [{index, turns}], tstamp}
              (FastChat, fastchat/llm_judge/gen_model_answer.py)
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treg_megatron.data.records import read_rows
from treg_megatron.errors import UserError
from treg_megatron.evaluation.answer_folder import prompt_hash
from treg_megatron.sampling.sample import read_prompts
from treg_megatron.tokenizer.conversation import Message
from treg_megatron.utils.files import atomic_write

ALPACA_EVAL, MT_BENCH, PROMPTS = "alpaca_eval", "mt_bench", "prompts"
ARENA_HARD = {"arena_hard_v0.1": {"arena-hard-v0.1"}, "arena_hard_v2": {"hard_prompt", "creative_writing"}}

_KEYS = {
    ALPACA_EVAL: ("instruction",),
    MT_BENCH: ("question_id", "category", "turns"),
    **dict.fromkeys(ARENA_HARD, ("uid", "category", "prompt")),
}


@dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt of a benchmark.

    Attributes:
        prompt_id: the benchmark's own id as text, or a hash where it has none.
        messages: the conversation as given. Each of several user turns in a row gets an answer.
        category, dataset: as the benchmark gives them.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    category: str | None = None
    dataset: str | None = None

    @property
    def turns(self) -> list[int]:
        """Positions in ``messages`` of the user turns that get an answer."""
        following = [message.role for message in self.messages[1:]] + ["user"]
        return [i for i, message in enumerate(self.messages) if message.role == following[i] == "user"]

    def conversation(self, answers: Sequence[str]) -> list[Message]:
        """The conversation up to the turn after the given answers."""
        turns = self.turns[: len(answers) + 1]
        messages = list(self.messages[: turns[-1] + 1])
        for turn, answer in reversed(list(zip(turns, answers, strict=False))):
            messages.insert(turn + 1, Message("assistant", answer))
        return messages


def read_benchmark(source: str, benchmark: str) -> list[BenchmarkPrompt]:
    """The prompts of a benchmark, in order.

    Raises:
        UserError: there are none, they are of another benchmark, or one comes twice.
    """
    if benchmark == PROMPTS:
        return [BenchmarkPrompt(p.prompt_id, p.messages) for p in read_prompts(source, Counter())]
    prompts: dict[str, BenchmarkPrompt] = {}
    for number, row in read_rows(source):
        try:
            prompt = _prompt(row, benchmark)
        except ValueError as error:
            raise UserError(f"{source} row {number} is not a prompt of {benchmark}: {error}") from None
        if prompt.prompt_id in prompts:
            raise UserError(f"{source} row {number} repeats prompt {prompt.prompt_id}")
        prompts[prompt.prompt_id] = prompt
    if not prompts:
        raise UserError(f"{source} holds no prompts")
    return list(prompts.values())


def write_benchmark_file(
    output: Path, benchmark: str, name: str, rows: Sequence[dict[str, Any]], times: Sequence[float]
) -> list[str]:
    """Write the answers in the form of the benchmark's own tools.

    Args:
        output: folder to write to.
        name: of the model.
        rows: of :class:`~treg_megatron.evaluation.answer_folder.Answers`, in the order of the prompts.
        times: when each was answered, in seconds since the epoch.

    Returns:
        paths of the files in ``output``.
    """
    if benchmark == PROMPTS:
        return []
    if benchmark == ALPACA_EVAL:
        path = output / "alpaca_eval.json"
        text = json.dumps([_for_alpaca_eval(row, name) for row in rows], indent=2, ensure_ascii=False) + "\n"
    else:
        path = output / "model_answer" / f"{name}.jsonl"
        form = _for_mt_bench if benchmark == MT_BENCH else _for_arena_hard
        timed = sorted(zip(rows, times, strict=True), key=lambda pair: _sort_key(pair[0]["prompt_id"]))
        text = "".join(json.dumps(form(row, name, time), ensure_ascii=False) + "\n" for row, time in timed)
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return [str(path.relative_to(output))]


def _prompt(row: Any, benchmark: str) -> BenchmarkPrompt:
    if not isinstance(row, dict):
        raise ValueError("it is not an object")
    if missing := [key for key in _KEYS[benchmark] if row.get(key) is None]:
        raise ValueError(f"it has no {' and no '.join(missing)}{_other_form(row)}")
    if benchmark == ALPACA_EVAL:
        message = Message("user", _text(row, "instruction"))
        dataset = row.get("dataset")
        return BenchmarkPrompt(prompt_hash([message.as_dict()]), (message,), dataset=dataset and str(dataset))
    category = _text(row, "category")
    if benchmark == MT_BENCH:
        turns = row["turns"]
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn for turn in turns):
            raise ValueError("turns must be a list of texts")
        if isinstance(row["question_id"], bool) or not isinstance(row["question_id"], int):
            raise ValueError("question_id must be a number")
        return BenchmarkPrompt(str(row["question_id"]), tuple(Message("user", turn) for turn in turns), category)
    if category not in ARENA_HARD[benchmark]:
        raise ValueError(f"its category is {category}{_other_form(row)}")
    return BenchmarkPrompt(_text(row, "uid"), (Message("user", _text(row, "prompt")),), category)


def _other_form(row: dict[str, Any]) -> str:
    """What else a row looks like, for a message."""
    for benchmark, keys in _KEYS.items():
        if all(row.get(key) is not None for key in keys):
            if benchmark in ARENA_HARD and row["category"] not in ARENA_HARD[benchmark]:
                continue
            if benchmark == MT_BENCH and "cluster" in row:
                return "; it is of an old Arena-Hard: take question.jsonl of the present arena-hard-auto"
            return f"; it looks like one of {benchmark}: set evaluate.benchmark={benchmark}"
    return ""


def _text(row: dict[str, Any], key: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise ValueError(f"{key} must be text")
    return row[key]


def _for_alpaca_eval(row: dict[str, Any], name: str) -> dict[str, Any]:
    dataset = {} if row["dataset"] is None else {"dataset": row["dataset"]}
    return {
        **dataset,
        "instruction": row["messages"][0]["content"],
        "output": row["answers"][0]["text"],
        "generator": name,
    }


def _for_arena_hard(row: dict[str, Any], name: str, time: float) -> dict[str, Any]:
    answer = {"role": "assistant", "content": {"answer": row["answers"][0]["text"]}}
    return {
        "uid": row["prompt_id"],
        "ans_id": _answer_id(row, name),
        "model": name,
        "messages": [*row["messages"], answer],
        "tstamp": time,
    }


def _for_mt_bench(row: dict[str, Any], name: str, time: float) -> dict[str, Any]:
    return {
        "question_id": int(row["prompt_id"]),
        "answer_id": _answer_id(row, name),
        "model_id": name,
        "choices": [{"index": 0, "turns": [answer["text"] for answer in row["answers"]]}],
        "tstamp": time,
    }


def _answer_id(row: dict[str, Any], name: str) -> str:
    """An id as short as those of shortuuid, which the tools take, that the answer decides."""
    content = json.dumps([name, row["prompt_id"], [answer["text"] for answer in row["answers"]]])
    return base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()[:16]).decode().rstrip("=")


def _sort_key(prompt_id: str) -> tuple[int, str]:
    """The order in which the tools leave their files: by number, or by text."""
    return (int(prompt_id), "") if prompt_id.isascii() and prompt_id.isdecimal() else (0, prompt_id)
