"""A chat server as judge by Arena-Hard's prompt: two verdicts per pair, one with each answer shown first.

Prompts, settings and the way a verdict is read are those of arena-hard-auto; ``arena_hard.yaml`` names the source. As
there, a verdict of "significantly better" counts three times, and a pair with only one verdict is not judged.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from treg_megatron.config.schema import JudgeSection
from treg_megatron.errors import UserError
from treg_megatron.evaluation.judges import Pair
from treg_megatron.evaluation.judges.chat import UNACCEPTABLE, ChatServer, text_of
from treg_megatron.utils.http import Refused

#: (arm's score if it was shown as A, weight), by verdict; all others are no verdicts
VERDICTS = {
    "A>>B": (1.0, 3),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "B=A": (0.5, 1),
    "B>A": (0.0, 1),
    "B>>A": (0.0, 3),
    "A<<B": (0.0, 3),
    "A<B": (0.0, 1),
    "B<A": (1.0, 1),
    "B<<A": (1.0, 3),
}


class ArenaHardJudge:
    """A :class:`~treg_megatron.evaluation.judges.Judge` by ``judge.model`` and Arena-Hard's prompt.

    Args:
        benchmark: of the answers; those of other benchmarks than Arena-Hard are judged by the prompt of v0.1.
        arm, baseline: names of the two models.

    Raises:
        UserError: see :class:`~treg_megatron.evaluation.judges.chat.ChatServer`.
    """

    def __init__(self, section: JudgeSection, benchmark: str, arm: str, baseline: str):
        self._section, self._server = section, ChatServer(section)
        self._arm, self._baseline = arm, baseline
        self._prompts = read_prompts()
        self._version = benchmark if benchmark in self._prompts["benchmarks"] else "arena_hard_v0.1"
        self._settings = self._prompts["benchmarks"][self._version]

    def identity(self) -> dict[str, Any]:
        """See :class:`~treg_megatron.evaluation.judges.Judge`."""
        return {
            "kind": "arena_hard",
            "name": self._section.model,
            "prompt": self._version,
            "temperature": self._section.temperature,
            "max_tokens": self._section.max_tokens or self._settings["max_tokens"],
            "verdict_attempts": self._section.verdict_attempts,
        }

    def require_readable(self, pairs: Sequence[Pair]) -> None:
        """See :class:`~treg_megatron.evaluation.judges.Judge`: single user messages, of known categories for v2."""
        for pair in pairs:
            self._messages(pair, arm_first=False)

    def __enter__(self) -> "ArenaHardJudge":
        self._server.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.__exit__()

    def judgments(self, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        """See :class:`~treg_megatron.evaluation.judges.Judge`; ``judge.concurrency`` requests at the same time."""
        with ThreadPoolExecutor(self._section.concurrency) as pool:
            # as in arena-hard-auto, the baseline's answer comes first in the first of two games
            asked = [[pool.submit(self._order, pair, arm_first) for arm_first in (False, True)] for pair in pairs]
            try:
                for pair, orders in zip(pairs, asked, strict=True):
                    yield _row(pair, [order.result() for order in orders])
            finally:
                pool.shutdown(cancel_futures=True)

    def files(self, pairs: Sequence[Pair], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
        """``model_judgment/JUDGE/ARM.jsonl``, as arena-hard-auto's ``show_result.py`` reads it."""
        judge = str(self._section.model).replace("/", "--")
        lines = []
        for pair, row in zip(pairs, rows, strict=True):
            games = [
                {
                    "score": order["verdict"] or None,
                    "judgment": {"answer": order["reply"]},
                    "prompt": self._messages(pair, order["arm_first"]),
                }
                for order in row["orders"]
            ]
            lines.append(
                {
                    "uid": pair.prompt_id,
                    "category": self._category(pair),
                    "judge": self._section.model,
                    "model": self._arm,
                    "baseline": self._baseline,
                    "games": games,
                }
            )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return {f"model_judgment/{judge}/{self._arm.replace('/', '--')}.jsonl": text}

    def _order(self, pair: Pair, arm_first: bool) -> dict[str, Any]:
        identity = self.identity()
        request = {
            "model": identity["name"],
            "messages": self._messages(pair, arm_first),
            "temperature": identity["temperature"],
            "max_tokens": identity["max_tokens"],
        }
        text = ""
        for attempt in range(self._section.verdict_attempts):
            try:
                text = text_of(self._server.reply(request, attempt))
            except Refused as error:
                if error.status not in UNACCEPTABLE:
                    raise
                return {"arm_first": arm_first, "preference": None, "verdict": "", "reply": str(error)}
            verdict = read_verdict(text, self._prompts["verdict_patterns"])
            if verdict is not None:
                preference = VERDICTS[verdict][0] if arm_first else 1 - VERDICTS[verdict][0]
                return {"arm_first": arm_first, "preference": preference, "verdict": verdict, "reply": text}
        return {"arm_first": arm_first, "preference": None, "verdict": "", "reply": text}

    def _messages(self, pair: Pair, arm_first: bool) -> list[dict[str, str]]:
        answers = (pair.arm[0], pair.baseline[0]) if arm_first else (pair.baseline[0], pair.arm[0])
        user = self._prompts["prompt_template"].format(QUESTION=pair.question, ANSWER_A=answers[0], ANSWER_B=answers[1])
        system = self._prompts["system_prompts"][self._settings["categories"][self._category(pair)]]
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    def _category(self, pair: Pair) -> str:
        """The category that decides a prompt's system prompt; v0.1 has one only, which answer files do not name."""
        known = self._settings["categories"]
        if len(known) == 1:
            return next(iter(known))
        if pair.category is None or pair.category not in known:
            raise UserError(
                f"prompt {pair.prompt_id} has the category {pair.category}, and the judge's prompt depends on it "
                f"({', '.join(known)}); judge answers that treg answers wrote: they name it"
            )
        return pair.category


@functools.cache
def read_prompts() -> dict[str, Any]:
    """The content of arena_hard.yaml."""
    return yaml.safe_load(Path(__file__).with_name("arena_hard.yaml").read_text(encoding="utf-8"))


def read_verdict(text: str, patterns: Sequence[str]) -> str | None:
    """The last verdict in a judge's reply, by the first of ``patterns`` that occurs in it; None if it has none."""
    for pattern in patterns:
        found = [match for match in re.findall(pattern, text.upper()) if match]
        if found:
            return found[-1] if found[-1] in VERDICTS else None
    return None


def _row(pair: Pair, orders: list[dict[str, Any]]) -> dict[str, Any]:
    preference = None
    if all(order["verdict"] for order in orders):
        weights = [VERDICTS[order["verdict"]][1] for order in orders]
        weighted = sum(weight * order["preference"] for weight, order in zip(weights, orders, strict=True))
        preference = weighted / sum(weights)
    return {
        "prompt_id": pair.prompt_id,
        "preference": preference,
        "arm_score": None,
        "baseline_score": None,
        "orders": orders,
    }
