"""Length-controlled win rates by ``alpaca_eval``'s own code, in the interpreter that has it.

alpaca_eval fits a logistic regression of the preferences on the difference in length and predicts the win rate of
answers as long as the baseline's. Its full form also takes the difficulty of each of AlpacaEval's 805 prompts and
regularises towards two models told to answer briefly and at length; both are in ``df_gamed.csv``, of the dataset
tatsu-lab/alpaca_eval on the Hugging Face hub. The minimal form needs the annotations alone.

Source: Dubois et al., Length-Controlled AlpacaEval: A Simple Way to Debias Automatic Evaluators (2024).
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treg_megatron.errors import UserError
from treg_megatron.evaluation.comparison import alpaca_eval_winrate
from treg_megatron.evaluation.intervals import SEED
from treg_megatron.utils.progress import Progress

#: resamples for an interval; each fits the regression again
ROUNDS = 200


@dataclass(frozen=True)
class LengthControl:
    """Length-controlled win rates of arms on the same prompts.

    Attributes:
        form: "full" or "minimal".
        version: of alpaca_eval.
        win_rates: raw win rate of each arm in percent, as alpaca_eval computes it.
        length_controlled: length-controlled win rate of each arm in percent.
        resampled: the same for each resample of the prompts (arms x resamples), alike for all arms.
    """

    form: str
    version: str
    win_rates: list[float]
    length_controlled: list[float]
    resampled: np.ndarray


class Unavailable(Exception):
    """alpaca_eval cannot be used; the message says why, and what to do."""


def length_control(
    arms: Sequence[Sequence[dict[str, Any]]],
    positions: Sequence[int],
    python: str | None = None,
    gamed: Path | None = None,
) -> LengthControl:
    """Length-controlled win rates of ``arms``, each a list of annotations in alpaca_eval's form.

    Args:
        positions: of the annotated prompts in the benchmark, ascending.
        python: interpreter that can import alpaca_eval; by default the running one.
        gamed: ``df_gamed.csv``, for the full form.

    Raises:
        Unavailable: the running interpreter has no alpaca_eval.
        UserError: ``python`` has none, or alpaca_eval fails.
    """
    interpreter = python or sys.executable
    _require_alpaca_eval(interpreter, named=python is not None)
    prompts = len(positions)
    draws = np.random.default_rng(SEED).integers(prompts, size=(ROUNDS, prompts))
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "asked.json", Path(folder) / "answered.json"
        asked.write_text(
            json.dumps(
                {
                    "gamed": gamed and str(gamed.resolve()),
                    "positions": list(positions),
                    "arms": list(arms),
                    "draws": draws.tolist(),
                }
            ),
            encoding="utf-8",
        )
        _run([interpreter, alpaca_eval_winrate.__file__, str(asked), str(answered)], len(arms) * (ROUNDS + 1))
        result = json.loads(answered.read_text(encoding="utf-8"))
    return LengthControl(
        "full" if gamed else "minimal",
        result["version"],
        [arm["win_rate"] for arm in result["arms"]],
        [arm["length_controlled"] for arm in result["arms"]],
        np.array([arm["resampled"] for arm in result["arms"]]),
    )


def _run(command: list[str], fits: int) -> None:
    """Run the program, which prints a line per fit of the regression."""
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as program,
        Progress("length control", "regressions", fits) as progress,
    ):
        assert program.stdout is not None
        for _ in program.stdout:
            progress.worked(1, 0)
        if program.wait():
            errors.seek(0)
            lines = errors.read().strip().splitlines()
            raise UserError(f"alpaca_eval in {command[0]} fails: {lines[-1] if lines else 'it says nothing'}")


def _require_alpaca_eval(interpreter: str, named: bool) -> None:
    test = "from importlib.metadata import version; version('alpaca-eval')"
    try:
        has_it = not subprocess.run([interpreter, "-c", test], capture_output=True).returncode
    except OSError as error:
        raise UserError(f"--alpaca-eval-python {interpreter}: {error.strerror}; name a Python interpreter") from None
    if has_it:
        return
    if named:
        raise UserError(
            f"--alpaca-eval-python {interpreter} has no alpaca_eval: run {interpreter} -m pip install alpaca-eval"
        )
    raise Unavailable(
        "alpaca_eval is not installed; pip install alpaca-eval here, or in an environment of its own and name that by "
        "--alpaca-eval-python PYTHON"
    )
