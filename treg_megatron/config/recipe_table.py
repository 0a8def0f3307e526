"""The list of the shipped recipes with what preflight says about each: stored beside them, made by
``make recipes-table``."""

import dataclasses
import json
from pathlib import Path

from treg_megatron.config.recipe import RECIPES

TABLE = RECIPES / "table.json"


@dataclasses.dataclass(frozen=True)
class Row:
    """One recipe on its stated cluster."""

    recipe: str
    parameters: int
    trained: int
    gpus: int
    gpu: str
    memory_gb: float  # of the fullest rank, predicted
    gpu_memory_gb: float
    tokens_per_step: int  # if every sequence has the full length
    bubble: float
    bubble_of_short_pairs: float  # where pairs are a third as long
    seconds_per_step: float
    hours: float  # for :data:`PAIRS`
    hyper_parameters: str


#: pairs for which the hours are estimated: about those of UltraFeedback
PAIRS = 60_000


NOTE = f"""\
GB: predicted, of the fullest GPU. Tokens, bubble and hours: every sequence of full length, {PAIRS:,} pairs, one epoch,
at the utilisation that docs/PREFLIGHT.md gives sources for; nothing of this was measured on GPUs.
`treg preflight --recipe NAME` computes it for your cluster and data."""


def read(path: Path = TABLE) -> list[Row]:
    """The stored rows, the smallest model first."""
    return [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def as_text(rows: list[Row]) -> str:
    """The table for a terminal."""
    lines = [
        f"{'recipe':<22}{'parameters':>11}  {'GPUs':<14}{'GB/GPU':>9}{'tokens/step':>15}{'bubble':>8}{'hours':>7}  "
        "hyper-parameters"
    ]
    lines += [
        f"{row.recipe:<22}{billions(row.parameters):>11}  {row.gpus:>3} {row.gpu:<10}{row.memory_gb:>9.1f}"
        f"{row.tokens_per_step:>15,}{_share(row.bubble):>8}{row.hours:>7.1f}  {row.hyper_parameters}"
        for row in rows
    ]
    return "\n".join([*lines, "", NOTE])


def as_markdown(rows: list[Row]) -> str:
    """The table for docs/RECIPES.md."""
    lines = [
        "| recipe | size | GPUs | GB per GPU | tokens per step "
        "| bubble | with short pairs | hours | hyper-parameters |",
        "|---|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {row.recipe} | {billions(row.parameters)} | {row.gpus} {row.gpu} | {row.memory_gb:.1f} | "
        f"{row.tokens_per_step:,} | {_share(row.bubble)} | {_share(row.bubble_of_short_pairs)} | {row.hours:.1f} | "
        f"{row.hyper_parameters} |"
        for row in rows
    ]
    return "\n".join(lines)


def billions(parameters: int) -> str:
    """A number of parameters as 8.03B."""
    return f"{parameters / 1e9:.3g}B"


def _share(share: float) -> str:
    return f"{share:.1%}" if share else "-"
