"""The tables of a report, as text cells that the page and the Markdown share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from treg_megatron.evaluation.reporting.shown import shown

_Cell = Callable[[dict[str, Any]], str]

# The keys of the objective that every table shows; others where arms differ in them.
_OBJECTIVE = ("loss_type", "alpha")


class Table(NamedTuple):
    """Headings and rows of text; the first column names the row."""

    headings: list[str]
    rows: list[list[str]]


def arm_table(comparison: dict[str, Any]) -> Table:
    """A row per arm; columns that are empty for every arm are left out."""
    arms = comparison["arms"]
    objectives = [arm["objective"] or {} for arm in arms]
    keys = [
        key
        for key in dict.fromkeys(key for objective in objectives for key in objective)
        if key in _OBJECTIVE or len({str(objective.get(key)) for objective in objectives}) > 1
    ]

    def of_objective(key: str) -> _Cell:
        return lambda arm: str((arm["objective"] or {}).get(key, ""))

    columns: list[tuple[str, _Cell]] = [
        ("arm", lambda arm: arm["name"]),
        *((key, of_objective(key)) for key in keys),
        ("win rate, %", lambda arm: measured(arm["win_rate"], arm["win_rate_interval"])),
        (
            f"length-controlled ({_form(comparison)}), %",
            lambda arm: measured(arm["length_controlled"], arm["length_controlled_interval"]),
        ),
        ("Arena-Hard score, %", lambda arm: measured(arm["score"], arm["score_interval"])),
        ("tokens", lambda arm: number(arm["mean_tokens"])),
        ("characters", lambda arm: number(arm["mean_characters"])),
        ("cut off, %", lambda arm: number(arm["truncated_share"], 100, ".1f")),
        ("reward accuracy, %", lambda arm: number((arm["accuracy"] or {}).get("implicit_reward"), 100, ".1f")),
        ("log-prob accuracy, %", lambda arm: number((arm["accuracy"] or {}).get("log_prob"), 100, ".1f")),
        ("KL, nats a token", lambda arm: measured(*kl_of(arm), form=".4f")),
    ]
    return _table(columns, arms)


def difference_table(comparison: dict[str, Any]) -> Table:
    """A row per two arms, on the same prompts."""
    columns: list[tuple[str, _Cell]] = [
        ("difference", lambda row: f"{row['a']} \u2212 {row['b']}"),
        ("win rate, points", lambda row: measured(row["win_rate"], row["interval"], "+")),
        (
            "length-controlled, points",
            lambda row: measured(row.get("length_controlled"), row.get("length_controlled_interval"), "+"),
        ),
        ("Arena-Hard score, points", lambda row: measured(row.get("score"), row.get("score_interval"), "+")),
        ("better", lambda row: str(row["wins"])),
        ("worse", lambda row: str(row["losses"])),
        ("tied", lambda row: str(row["ties"])),
        ("sign test, p", lambda row: f"{row['sign_test_p']:.2g}"),
    ]
    return _table(columns, comparison["differences"])


def kl_of(arm: dict[str, Any]) -> tuple[float | None, Sequence[float] | None]:
    """The arm's KL in nats a token and the ends of its interval, or None twice."""
    kl = arm["kl"] or {}
    return kl.get("nats_per_token"), kl.get("nats_per_token_interval", kl.get("interval"))


def measured(value: float | None, ends: Sequence[float] | None, sign: str = "", form: str = ".1f") -> str:
    """A value with the ends of its interval, or nothing."""
    if value is None:
        return ""
    interval = f" [{ends[0]:{sign}{form}}, {ends[1]:{sign}{form}}]" if ends else ""
    return f"{value:{sign}{form}}{interval}".replace("-", "\u2212")


def number(value: float | None, factor: float = 1, form: str = ",.0f") -> str:
    """A number, or nothing."""
    return "" if value is None else f"{factor * value:{form}}"


def _form(comparison: dict[str, Any]) -> str:
    return (comparison.get("length_control") or {}).get("form") or comparison["arms"][0]["length_control"]


def _table(columns: Sequence[tuple[str, _Cell]], rows: Sequence[dict[str, Any]]) -> Table:
    cells = [(heading, [shown(cell(row)) for row in rows]) for heading, cell in columns]
    filled = [(heading, column) for heading, column in cells if any(column)]
    headings = [heading for heading, _ in filled]
    return Table(headings, [list(row) for row in zip(*(column for _, column in filled), strict=True)])
