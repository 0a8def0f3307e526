"""Comparison of arms that one judge judged on the same prompts, as ``comparison.json`` holds it."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from treg_megatron.errors import UserError
from treg_megatron.evaluation.comparison.arms import Arm, read_arms
from treg_megatron.evaluation.comparison.bradley_terry import score, score_interval
from treg_megatron.evaluation.comparison.comparable import require_comparable
from treg_megatron.evaluation.comparison.length_control import LengthControl, Unavailable, length_control
from treg_megatron.evaluation.comparison.run_records import run_records
from treg_megatron.evaluation.intervals import CONFIDENCE, interval, resampled_sums, sign_test
from treg_megatron.utils.files import sha256_of_json, write_manifest

logger = logging.getLogger(__name__)

FORMAT, VERSION = "treg-megatron comparison", 1
NAME = "comparison.json"

#: hash of the ids of AlpacaEval's prompts in their order, which df_gamed.csv numbers them by
ALPACA_EVAL_PROMPTS = "5cd029d9d6d00300f5324366430ed091bfb7cdab197c5473bd3bd708899e4dac"


class _Figures(NamedTuple):
    """A figure of each arm in percent, and of each resample of the prompts (resamples x arms)."""

    values: np.ndarray
    resampled: np.ndarray


def compare(
    paths: Sequence[str | Path],
    category: str | None = None,
    alpaca_eval_python: str | None = None,
    gamed: Path | None = None,
) -> dict[str, Any]:
    """The comparison of arms, as ``comparison.json`` holds it.

    A prompt that the judge failed on for one arm is left out for all.

    Args:
        paths, category: as for :func:`~treg_megatron.evaluation.comparison.arms.read_arms`.
        alpaca_eval_python: interpreter that has alpaca_eval; by default the running one.
        gamed: alpaca_eval's ``df_gamed.csv``, for the full form of the length-controlled win rate.

    Raises:
        UserError: an arm cannot be read, two arms cannot be compared, or no prompt was judged for all arms.
    """
    arms = read_arms(paths, category)
    require_comparable(arms)
    prompts = [prompt for prompt in arms[0].judged if all(_is_judged(arm, prompt) for arm in arms)]
    if not prompts:
        raise UserError("the judge failed on every prompt for one of the arms: there is nothing to compare")
    if left_out := len(arms[0].judged) - len(prompts):
        logger.warning("%d of %d prompts are left out: the judge failed on them", left_out, len(arms[0].judged))
    preferences = np.array([[_preference(arm, prompt) for arm in arms] for prompt in prompts])
    win_rates = _win_rates(preferences)
    scores = _scores(arms, prompts)
    controlled, length_note = _length_controlled(arms, prompts, alpaca_eval_python, gamed)
    return {
        "benchmark": arms[0].benchmark,
        "judge": arms[0].judge,
        "baseline": arms[0].baseline["name"],
        "prompts": len(prompts),
        "left_out": left_out,
        "confidence": CONFIDENCE,
        "length_control": length_note,
        "arms": [
            {
                "name": arm.name,
                **run_records(arm.folders.get("run")),
                **{key: _path(arm, key) for key in ("answers", "baseline_answers", "judgments")},
                **_with_interval("win_rate", win_rates, number),
                **_with_interval("length_controlled", controlled, number),
                "length_control": length_note["form"],
                **_arena_hard_score(arm, prompts),
                "mean_tokens": arm.mean_tokens,
                "mean_characters": arm.mean_characters,
                "truncated_share": arm.truncated_share,
            }
            for number, arm in enumerate(arms)
        ],
        "differences": [
            {
                "a": arms[a].name,
                "b": arms[b].name,
                **_difference("win_rate", win_rates, a, b, interval_name="interval"),
                **_difference("length_controlled", controlled, a, b),
                **_difference("score", scores, a, b),
                **_signs(preferences[:, a] - preferences[:, b]),
            }
            for a, b in itertools.combinations(range(len(arms)), 2)
        ],
    }


def write_comparison(comparison: dict[str, Any], folder: Path) -> Path:
    """Write ``comparison.json`` into a folder, replacing an earlier one; return its path."""
    write_manifest(folder / NAME, FORMAT, VERSION, comparison)
    return folder / NAME


def _is_judged(arm: Arm, prompt: str) -> bool:
    return arm.judged[prompt].preference is not None


def _preference(arm: Arm, prompt: str) -> float:
    preference = arm.judged[prompt].preference
    assert preference is not None
    return preference


def _path(arm: Arm, key: str) -> str | None:
    return str(arm.folders[key]) if key in arm.folders else None


def _win_rates(preferences: np.ndarray) -> _Figures:
    return _Figures(100 * preferences.mean(0), 100 * resampled_sums(preferences) / len(preferences))


def _scores(arms: Sequence[Arm], prompts: Sequence[str]) -> _Figures | None:
    """Arena-Hard's score of each arm, by prompts."""
    if not all(arm.judged[prompt].games for arm in arms for prompt in prompts):
        return None
    points, times = (
        np.array(
            [
                [sum(game.times * (game.points if won else 1) for game in arm.judged[prompt].games) for arm in arms]
                for prompt in prompts
            ]
        )
        for won in (True, False)
    )
    drawn = resampled_sums(np.hstack([points, times]))
    return _Figures(100 * points.sum(0) / times.sum(0), 100 * drawn[:, : len(arms)] / drawn[:, len(arms) :])


def _arena_hard_score(arm: Arm, prompts: Sequence[str]) -> dict[str, Any]:
    games = [game for prompt in prompts for game in arm.judged[prompt].games]
    if not games:
        return {"score": None, "score_interval": None}
    return {"score": score(games), "score_interval": list(score_interval(games))}


def _length_controlled(
    arms: Sequence[Arm], prompts: Sequence[str], alpaca_eval_python: str | None, gamed: Path | None
) -> tuple[_Figures | None, dict[str, str]]:
    """The length-controlled win rates, if they can be had, and which form they are of or why there are none."""
    order = list(arms[0].judged)
    if gamed and not gamed.is_file():
        raise UserError(f"--df-gamed {gamed} does not exist")
    if gamed and sha256_of_json(order) != ALPACA_EVAL_PROMPTS:
        raise UserError(
            f"--df-gamed {gamed} is about the 805 prompts of AlpacaEval in order; {arms[0].name} has others"
        )
    place = {prompt: position for position, prompt in enumerate(order)}
    positions = [place[prompt] for prompt in prompts]
    try:
        found = length_control([_annotations(arm, prompts) for arm in arms], positions, alpaca_eval_python, gamed)
    except Unavailable as reason:
        if gamed or alpaca_eval_python:
            raise UserError(f"the length-controlled win rate cannot be computed: {reason}") from None
        return None, {"form": "none", "note": f"no length-controlled win rate: {reason}"}
    figures = _Figures(np.array(found.length_controlled), found.resampled.T)
    return figures, {"form": found.form, "note": _note(found)}


def _note(found: LengthControl) -> str:
    if found.form == "full":
        return f"length-controlled win rate: the full form of alpaca_eval {found.version}"
    return (
        f"length-controlled win rate: the minimal form of alpaca_eval {found.version}, not what its leaderboard shows; "
        "the full form needs --df-gamed FILE (df_gamed.csv of the dataset tatsu-lab/alpaca_eval)"
    )


def _annotations(arm: Arm, prompts: Sequence[str]) -> list[dict[str, Any]]:
    """The judgments in the form of alpaca_eval, which calls the baseline 1 and the arm 2."""
    annotations = []
    for prompt in prompts:
        texts = arm.judged[prompt].texts
        if texts is None:
            raise Unavailable(f"the answers of {arm.name} or of its baseline are not at hand, and so their lengths")
        annotations.append(
            {
                "generator_1": "baseline",
                "generator_2": "arm",
                "output_1": texts.baseline,
                "output_2": texts.arm,
                "preference": 1 + _preference(arm, prompt),
            }
        )
    return annotations


def _with_interval(name: str, figures: _Figures | None, number: int) -> dict[str, Any]:
    if figures is None:
        return {name: None, f"{name}_interval": None}
    ends = interval(figures.resampled[:, number])
    return {name: float(figures.values[number]), f"{name}_interval": list(ends)}


def _difference(name: str, figures: _Figures | None, a: int, b: int, interval_name: str = "") -> dict[str, Any]:
    interval_name = interval_name or f"{name}_interval"
    if figures is None:
        return {name: None, interval_name: None}
    ends = interval(figures.resampled[:, a] - figures.resampled[:, b])
    return {name: float(figures.values[a] - figures.values[b]), interval_name: list(ends)}


def _signs(differences: np.ndarray) -> dict[str, Any]:
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return {
        "wins": wins,
        "losses": losses,
        "ties": len(differences) - wins - losses,
        "sign_test_p": sign_test(wins, losses),
    }
