"""Judges that score each answer by itself: a reward model, or a function of the user's own.

The higher score wins, and equal scores are a tie. Nothing is made of the distance: each model's scores have a scale of
their own (ArmoRM's lie within a few tenths of each other), so that a sigmoid of the difference would mean something
else for each. Both scores are kept with the preference.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from treg_megatron.config.schema import JudgeSection
from treg_megatron.evaluation.judges import Pair
from treg_megatron.sampling.scores import RewardModel, ScoreFunction, finite_scores, imported_function


class ScoreJudge:
    """A :class:`~treg_megatron.evaluation.judges.Judge` by ``judge.reward_model`` or ``judge.function``."""

    def __init__(self, section: JudgeSection):
        self._section = section

    def identity(self) -> dict[str, Any]:
        """See :class:`~treg_megatron.evaluation.judges.Judge`; a reward model is named by its folder and its hash."""
        section = self._section
        if section.kind == "function":
            return {"kind": "function", "name": section.function}
        from treg_megatron.models.huggingface import model_identity

        return {"kind": "reward_model", **model_identity(str(section.reward_model)), "dtype": section.dtype}

    def require_readable(self, pairs: Sequence[Pair]) -> None:
        """Nothing: conversations of any form have a score."""

    def __enter__(self) -> "ScoreJudge":
        section = self._section
        self._score: ScoreFunction = (
            imported_function(str(section.function), "judge.function")
            if section.kind == "function"
            else RewardModel(section, "judge")
        )
        return self

    def __exit__(self, *_: object) -> None:
        del self._score

    def judgments(self, pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
        """See :class:`~treg_megatron.evaluation.judges.Judge`."""
        for pair in pairs:
            arm, baseline = self._scores(pair)
            yield {
                "prompt_id": pair.prompt_id,
                "preference": 0.5 if arm == baseline else float(arm > baseline),
                "arm_score": arm,
                "baseline_score": baseline,
                "orders": [],
            }

    def files(self, pairs: Sequence[Pair], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
        """None: no benchmark has a form for scores."""
        return {}

    def _scores(self, pair: Pair) -> tuple[float, float]:
        """Scores of arm and baseline; of several turns, each after the turns before it, the mean."""
        if len(pair.arm) == 1:
            scores = finite_scores(pair.prompt_id, self._score(pair.messages, [pair.arm[0], pair.baseline[0]]), 2)
            return scores[0], scores[1]
        return self._mean_over_turns(pair, pair.arm), self._mean_over_turns(pair, pair.baseline)

    def _mean_over_turns(self, pair: Pair, answers: list[str]) -> float:
        conversation: list[dict[str, str]] = []
        total = 0.0
        for message, answer in zip(pair.messages, answers, strict=True):
            conversation = [*conversation, message]
            total += finite_scores(pair.prompt_id, self._score(conversation, [answer]), 1)[0]
            conversation = [*conversation, {"role": "assistant", "content": answer}]
        return total / len(answers)
