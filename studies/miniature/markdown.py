"""Pieces of a Markdown page."""

from collections.abc import Iterator, Sequence

from studies.miniature.bootstrap import Estimate


def heading(title: str) -> Iterator[str]:
    """A section heading in Markdown."""
    yield from ("", f"## {title}", "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table with the first column left-aligned and the others right-aligned."""
    yield f"| {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * (len(columns) - 1)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def shown(estimate: Estimate, digits: int = 3, signed: bool = False) -> str:
    """An estimate as text: 0.912 [0.905, 0.919]."""
    value, low, high = (f"{number:{'+' if signed else ''}.{digits}f}" for number in estimate[:3])
    return f"{value} [{low}, {high}]"
