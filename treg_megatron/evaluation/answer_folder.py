"""Answers of a model under evaluation, as judging and comparing read them.

    run.json               everything that decides the answers
    answers-00000.jsonl    shards, one row per prompt
    alpaca_eval.json       or model_answer/NAME.jsonl: the same in the form of the benchmark's own tools
    manifest.json          written last

A file in the form of a benchmark's own tools can take the folder's place, such as the answers of a published model.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treg_megatron.data.records import read_rows
from treg_megatron.errors import UserError
from treg_megatron.utils.files import read_manifest, sha256_of_json
from treg_megatron.utils.shard_job import MANIFEST_NAME, RUN_NAME

FORMAT, VERSION = "treg-megatron answers", 1
SHARD_PATTERN = "answers-{:05d}.jsonl"
BENCHMARKS = ("alpaca_eval", "arena_hard_v0.1", "arena_hard_v2", "mt_bench", "prompts")

# Arena-Hard's own ids: v0.1 numbers its prompts by 32 hexadecimal digits, v2 by 16.
_ARENA_HARD_V1_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Answers:
    """The answers of one model to the prompts of one benchmark.

    Attributes:
        name: of the model, as the benchmark's tools show it.
        benchmark: one of :data:`BENCHMARKS`.
        rows: per prompt ``prompt_id``, ``messages`` (the user's turns), ``answers``, ``category`` and ``dataset``. Each
            answer has ``text``, without white space around it, ``ids``, ``finished`` and ``tokens``. What nothing
            tells is None.
        settings: sampling settings and what else decides the answers; None for a file of a benchmark's tools.
        prompts_sha256: :func:`prompts_hash` of the rows.
        folder: where they were read from; a file, for the form of a benchmark's tools.
        manifest: of the folder; None for such a file.
    """

    name: str
    benchmark: str
    rows: list[dict[str, Any]]
    settings: dict[str, Any] | None
    prompts_sha256: str
    folder: Path
    manifest: dict[str, Any] | None

    @property
    def mean_characters(self) -> float:
        """Characters per answer, on average."""
        lengths = [len(answer["text"]) for answer in _answers(self.rows)]
        return sum(lengths) / len(lengths)

    @property
    def mean_tokens(self) -> float | None:
        """Tokens per answer, on average; None if the number is unknown for one."""
        lengths = [answer["tokens"] for answer in _answers(self.rows)]
        return None if None in lengths else sum(lengths) / len(lengths)

    @property
    def truncated(self) -> int | None:
        """How many answers were cut off; None if that is unknown."""
        finished = [answer["finished"] for answer in _answers(self.rows)]
        return None if None in finished else finished.count(False)


def prompts_hash(rows: Sequence[dict[str, Any]]) -> str:
    """Hex digest of the prompts of ``rows`` by their ids, whatever their order."""
    return sha256_of_json(sorted([row["prompt_id"], row["messages"]] for row in rows))


def prompt_hash(messages: Sequence[Any]) -> str:
    """The id of a prompt that has none of its own: 16 hexadecimal digits that its messages decide."""
    return sha256_of_json(messages)[:16]


def read_answers(path: str | Path) -> Answers:
    """Answers in a folder of this program, or in a file in the form of AlpacaEval's, Arena-Hard's or MT-Bench's tools.

    MT-Bench's files do not hold the prompts: they are read from ``question.jsonl`` in the folder above.

    Raises:
        UserError: there are none, they are unfinished or incomplete, or the file is of another form.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return _read_folder(path)
    rows = list(read_rows(path))
    if not rows:
        raise UserError(f"{path} holds no answers")
    first = rows[0][1] if isinstance(rows[0][1], dict) else {}
    form = next((form for key, form in _FORMS.items() if key in first), None)
    if form is None:
        raise UserError(
            f"{path} holds no answers of a form that can be read: AlpacaEval's objects have the keys instruction and "
            "output, Arena-Hard's uid, model and messages, MT-Bench's question_id, model_id and choices"
        )
    benchmark, of_file = form
    questions = _questions(path) if benchmark == "mt_bench" else {}
    read: list[dict[str, Any]] = []
    names = set()
    for number, row in rows:
        try:
            name, answered = of_file(row, questions)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(f"{path} row {number} is not an answer in the form of row 1: {error!r}") from None
        names.add(name)
        read.append(answered)
    if len(names) > 1:
        raise UserError(f"{path} holds answers of several models ({', '.join(sorted(names))}); name a file of one")
    if not benchmark:
        first_form = _ARENA_HARD_V1_ID.fullmatch(read[0]["prompt_id"])
        benchmark = "arena_hard_v0.1" if first_form else "arena_hard_v2"
    _require_distinct(read, path)
    return Answers(names.pop(), benchmark, read, None, prompts_hash(read), path, None)


def _read_folder(folder: Path) -> Answers:
    if not (folder / MANIFEST_NAME).exists() and (folder / RUN_NAME).exists():
        raise UserError(f"the answers in {folder} are unfinished: rerun the command that writes them")
    manifest = read_manifest(folder / MANIFEST_NAME, FORMAT, VERSION)
    rows: list[dict[str, Any]] = []
    for name in manifest["shards"]:
        rows += (row for _, row in read_rows(folder / name))
    if len(rows) != manifest["prompts"] or prompts_hash(rows) != manifest["prompts_sha256"]:
        raise UserError(f"{folder} does not hold the answers that its manifest lists: make them anew")
    return Answers(
        manifest["name"],
        manifest["benchmark"],
        rows,
        manifest["settings"],
        manifest["prompts_sha256"],
        folder,
        manifest,
    )


def _of_alpaca_eval(row: Any, _: dict) -> tuple[str, dict[str, Any]]:
    messages = [{"role": "user", "content": _text(row["instruction"])}]
    return _text(row["generator"]), _row(prompt_hash(messages), messages, [row["output"]], dataset=row.get("dataset"))


def _of_arena_hard(row: Any, _: dict) -> tuple[str, dict[str, Any]]:
    asked = [
        {"role": "user", "content": _text(message["content"])}
        for message in row["messages"]
        if message["role"] == "user"
    ]
    answer = row["messages"][-1]["content"]["answer"]
    return _text(row["model"]), _row(_text(row["uid"]), asked, [answer])


def _of_mt_bench(row: Any, questions: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    question = questions[str(row["question_id"])]
    asked = [{"role": "user", "content": _text(turn)} for turn in question["turns"]]
    answers = row["choices"][0]["turns"]
    if len(answers) != len(asked):
        raise ValueError(f"{len(answers)} answers to {len(asked)} turns")
    return _text(row["model_id"]), _row(str(row["question_id"]), asked, answers, category=question["category"])


def _row(
    prompt_id: str,
    messages: list[dict[str, str]],
    texts: Sequence[str],
    category: str | None = None,
    dataset: str | None = None,
) -> dict[str, Any]:
    answers = [{"text": _text(text), "ids": None, "finished": None, "tokens": None} for text in texts]
    return {
        "prompt_id": prompt_id,
        "messages": messages,
        "answers": answers,
        "category": category,
        "dataset": dataset,
    }


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be text")
    return value


def _questions(path: Path) -> dict[str, dict[str, Any]]:
    beside = path.parent.parent / "question.jsonl"
    if not beside.is_file():
        raise UserError(f"{path} holds answers of MT-Bench without their prompts: put its question.jsonl at {beside}")
    return {str(row["question_id"]): row for _, row in read_rows(beside)}


def _require_distinct(rows: Sequence[dict[str, Any]], path: Path) -> None:
    seen: set[str] = set()
    for row in rows:
        if row["prompt_id"] in seen:
            raise UserError(f"{path} answers prompt {row['prompt_id']} twice")
        seen.add(row["prompt_id"])


def _answers(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (answer for row in rows for answer in row["answers"])


# by a key that only the answers of one benchmark have; Arena-Hard's version is told by its ids
_FORMS: dict[str, tuple[str, Callable[[Any, dict], tuple[str, dict[str, Any]]]]] = {
    "instruction": ("alpaca_eval", _of_alpaca_eval),
    "uid": ("", _of_arena_hard),
    "question_id": ("mt_bench", _of_mt_bench),
}
