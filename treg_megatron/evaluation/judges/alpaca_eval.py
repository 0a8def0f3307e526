"""A chat server as judge by one of alpaca_eval's own annotators, which run in the package's own process.

An annotator is a prompt, what is asked of the server, and how its reply is read. The leaderboard's,
``weighted_alpaca_eval_gpt4_turbo``, reads the probability of the answer's name from log-probs. It shows the two answers
in an order that the prompt decides; with ``judge.orders=both`` each pair is judged in the other order, too.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from treg_megatron.config.schema import JudgeSection
from treg_megatron.errors import UserError
from treg_megatron.evaluation.judges import Pair
from treg_megatron.evaluation.judges.chat import ChatServer
from treg_megatron.evaluation.judges.chat_proxy import ChatProxy

PACKAGE = "alpaca-eval==0.6.6"  # the release that this is tested with
_VERSION_SCRIPT = "import importlib.metadata as m; print(m.version('alpaca-eval'))"


class AlpacaEvalJudge:
    """A :class:`~treg_megatron.evaluation.judges.Judge` by ``judge.model`` and ``judge.annotator``.

    Args:
        arm, baseline: names of the two models.

    Raises:
        UserError: alpaca_eval is not installed, or see :class:`~treg_megatron.evaluation.judges.chat.ChatServer`.
    """

    def __init__(self, section: JudgeSection, arm: str, baseline: str):
        self._section, self._server = section, ChatServer(section)
        self._arm, self._baseline = arm, baseline
        self._python = section.alpaca_eval_python or sys.executable
        self._version = installed_version(self._python)

    def identity(self) -> dict[str, Any]:
        """See :class:`~treg_megatron.evaluation.judges.Judge`."""
        return {
            "kind": "alpaca_eval",
            "name": self._section.model,
            "annotator": self._section.annotator,
            "alpaca_eval": self._version,
            "orders": self._section.orders,
            "verdict_attempts": self._section.verdict_attempts,
        }

    def require_readable(self, pairs: Sequence[Pair]) -> None:
        """See :class:`~treg_megatron.evaluation.judges.Judge`: single user messages."""
        for pair in pairs:
            _ = pair.question

    def __enter__(self) -> "AlpacaEvalJudge":
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._server)
            self._proxy = stack.enter_context(ChatProxy(self._server))
            self._process = stack.enter_context(_Annotator(self._python, self._section, self._proxy))
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def judgments(self, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        """See :class:`~treg_megatron.evaluation.judges.Judge`; ``judge.concurrency`` requests at the same time.

        The first order is alpaca_eval's own, with the arm's answer as output_2; in the second they are exchanged.
        """
        orders = [self._order(pairs, arm_is_output_2=True)]
        if self._section.orders == "both":
            orders.append(self._order(pairs, arm_is_output_2=False))
        for pair, *judged in zip(pairs, *orders, strict=True):
            preferences = [order["preference"] for order in judged]
            yield {
                "prompt_id": pair.prompt_id,
                "preference": None if None in preferences else sum(preferences) / len(preferences),
                "arm_score": None,
                "baseline_score": None,
                "orders": judged,
            }

    def files(self, pairs: Sequence[Pair], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
        """``annotations.json``, as ``alpaca_eval evaluate`` writes it: the judgments in its own order."""
        annotations = [row["orders"][0]["annotation"] for row in rows]
        return {"annotations.json": json.dumps(annotations, indent=2, ensure_ascii=False) + "\n"}

    def _order(self, pairs: Sequence[Pair], arm_is_output_2: bool) -> list[dict[str, Any]]:
        """The annotations of all pairs; those without a preference are asked for again."""
        orders: list[dict[str, Any]] = [{} for _ in pairs]
        waiting = list(range(len(pairs)))
        for attempt in range(self._section.verdict_attempts):
            records = [self._records(pairs[i], arm_is_output_2) for i in waiting]
            annotated = self._process.annotate(attempt, [one for one, _ in records], [two for _, two in records])
            for i, annotation, switched in zip(waiting, *annotated, strict=True):
                orders[i] = read_annotation(annotation, switched, arm_is_output_2)
                if orders[i]["preference"] is None and self._proxy.refusal is not None:
                    orders[i]["reply"] = orders[i]["reply"].strip() or self._proxy.refusal
            waiting = [i for i in waiting if orders[i]["preference"] is None]
            if not waiting:
                break
        return orders

    def _records(self, pair: Pair, arm_is_output_2: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """The pair as two records of alpaca_eval's answer files, output_1 and output_2."""
        prompt = {"instruction": pair.question, "dataset": pair.dataset}
        arm = {**prompt, "output": pair.arm[0], "generator": self._arm}
        baseline = {**prompt, "output": pair.baseline[0], "generator": self._baseline}
        return (baseline, arm) if arm_is_output_2 else (arm, baseline)


def read_annotation(annotation: dict[str, Any], switched: bool, arm_is_output_2: bool) -> dict[str, Any]:
    """An entry of a row's ``orders``, with the annotation itself.

    Args:
        annotation: whose ``preference`` is 1 if output_1 is better, 2 if output_2 is, or a number in between.
        switched: whether output_2 was shown first.
    """
    value = annotation.get("preference")
    if value is None:
        preference = None
    else:
        preference = value - 1.0 if arm_is_output_2 else 2.0 - value
    raw = annotation.get("preference_raw_completion")
    text = str((raw.get("text") if isinstance(raw, dict) else raw) or "")
    return {
        "arm_first": switched == arm_is_output_2,
        "preference": preference,
        "verdict": text if preference is not None else "",
        "reply": text,
        "annotation": annotation,
    }


def installed_version(python: str) -> str:
    """The version of alpaca_eval in the environment of a Python.

    Raises:
        UserError: there is none, or no such Python.
    """
    try:
        done = subprocess.run([python, "-c", _VERSION_SCRIPT], capture_output=True, text=True)
    except OSError as error:
        raise UserError(f"judge.alpaca_eval_python={python} cannot be started: {error.strerror}") from None
    if done.returncode:
        raise UserError(
            f"the package alpaca_eval is not installed for {python}: pip install {PACKAGE}, here or in an environment "
            "of its own whose Python judge.alpaca_eval_python names"
        )
    return done.stdout.strip()


class _Annotator:
    """The process that runs alpaca_eval's annotator, a context manager; its log serves the message of a failure."""

    def __init__(self, python: str, section: JudgeSection, proxy: ChatProxy):
        self._python, self._section, self._proxy = python, section, proxy

    def __enter__(self) -> "_Annotator":
        section = self._section
        environment = {name: value for name, value in os.environ.items() if name != section.api_key_env}
        environment["OPENAI_MAX_CONCURRENCY"] = str(section.concurrency)
        environment["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1"]))
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")
        self._process = subprocess.Popen(
            [self._python, str(Path(__file__).with_name("alpaca_eval_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            env=environment,
        )
        try:
            self._ask({"annotator": section.annotator, "model": section.model, "api_key": self._proxy.token})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def annotate(self, attempt: int, outputs_1: list, outputs_2: list) -> tuple[list[dict[str, Any]], list[bool]]:
        """alpaca_eval's annotations of pairs, and which were judged with output_2 shown first."""
        task = {"base_url": self._proxy.address(attempt), "outputs_1": outputs_1, "outputs_2": outputs_2}
        answer = self._ask(task)
        return answer["annotations"], answer["switched"]

    def _ask(self, task: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if answer:
            return json.loads(answer)
        self._process.wait()
        if self._proxy.failure is not None:
            raise self._proxy.failure
        self._log.seek(0)
        lines = [line for line in self._log.read().splitlines() if line.strip()] or ["it says nothing"]
        raise UserError(f"alpaca_eval's annotator {self._section.annotator} has failed: {lines[-1]}")
