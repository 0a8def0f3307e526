"""The tables of a comparison for a terminal."""

from typing import Any

from treg_megatron.evaluation.reporting.notes import notes
from treg_megatron.evaluation.reporting.tables import Table, arm_table, difference_table


def as_text(comparison: dict[str, Any]) -> str:
    """The arms, their differences, and what the figures are."""
    tables = [arm_table(comparison), *([difference_table(comparison)] if comparison["differences"] else [])]
    return "\n\n".join([*map(_aligned, tables), *notes(comparison)])


def _aligned(table: Table) -> str:
    """The first column to the left, the others to the right."""
    columns = list(zip(table.headings, *table.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in (table.headings, *table.rows)
    )
