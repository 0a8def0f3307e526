"""The report of ``inspect`` as one HTML file without scripts: counts, histograms, writing systems, examples."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from treg_megatron.data.inspection import LENGTHS, as_lines
from treg_megatron.utils.files import atomic_write
from treg_megatron.utils.terminal import without_control_bytes

_WIDTH, _HEIGHT = 320, 90  # of a histogram, in CSS pixels
_BAR = 300  # of the most frequent writing system

_TEMPLATE = Path(__file__).resolve().with_name("inspection.html")


def write_page(path: str | Path, source: str, report: Mapping[str, Any]) -> None:
    """Write the report of :func:`~treg_megatron.data.inspection.inspect_pairs` as a page.

    Raises:
        UserError: the file cannot be written.
    """
    counts = {**report, "lengths": {}, "unusable": 0, "first_unusable": []}
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        source=_text(source),
        unusable=_unusable(report["unusable"], report["first_unusable"]),
        warnings="".join(f'<p class="warning">{_text(warning)}</p>' for warning in report["warnings"]),
        lines="".join(f"<li>{_text(line)}</li>" for line in as_lines(counts)),
        unit=report["unit"],
        lengths="".join(_length(name, values) for name, values in report["lengths"].items()),
        histograms="".join(_histogram(name, **values) for name, values in report["histograms"].items()),
        scripts="".join(_script(name, count, report["scripts"]) for name, count in report["scripts"].items()),
        as_what="as tokens decode" if report["unit"] == "tokens" else "without a chat template",
        examples="".join(map(_example, report["examples"])) or "<p>none</p>",
    )
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _text(text: Any) -> str:
    return escape(without_control_bytes(str(text)))


def _unusable(number: int, first: Sequence[str]) -> str:
    if not number:
        return ""
    listed = "".join(f"<li>{_text(message)}</li>" for message in first)
    more = f"<li>and {number - len(first):,} more</li>" if number > len(first) else ""
    return f'<div class="warning" id="unusable">cannot be used: {number:,} rows<ul>{listed}{more}</ul></div>'


def _length(name: str, values: Sequence[int]) -> str:
    return f"<tr><th>{LENGTHS[name]}</th>" + "".join(f"<td>{value:,}</td>" for value in values) + "</tr>"


def _script(name: str, count: int, counts: Mapping[str, int]) -> str:
    width = _BAR * count / max(counts.values())
    return (
        f"<tr><th>{escape(name.lower())}</th><td>{count:,}</td>"
        f'<th><span class="bar" style="width: {width:.0f}px"></span>{count / sum(counts.values()):.1%}</th></tr>'
    )


def _histogram(name: str, low: float, high: float, counts: Sequence[int], median: float, median_at: float) -> str:
    step, most = _WIDTH / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{_HEIGHT * (1 - count / most):.1f}" width="{max(step - 1, 1):.1f}" '
        f'height="{_HEIGHT * count / most:.1f}" fill="#2166ac"><title>{count:,} pairs</title></rect>'
        for i, count in enumerate(counts)
        if count
    )
    middle = _WIDTH * median_at
    return (
        f'<figure><svg width="{_WIDTH}" height="{_HEIGHT + 16}" role="img" '
        f'aria-label="{escape(name)}: from {low:,g} to {high:,g}, median {median:,g}">{bars}'
        f'<line class="median" x1="{middle:.1f}" x2="{middle:.1f}" y1="0" y2="{_HEIGHT}"/>'
        f'<text x="0" y="{_HEIGHT + 13}">{low:,g}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 13}" text-anchor="end">{high:,g}</text></svg>'
        f"<figcaption>{escape(name)} (median {median:,g})</figcaption></figure>"
    )


def _example(example: Mapping[str, Any]) -> str:
    prompt, chosen, rejected = (_text(example[name]) for name in ("prompt", "chosen", "rejected"))
    return (
        f"<article><b>{_text(example['pair_id'])}</b>, row {example['row']:,}<pre>{prompt}</pre>"
        f'<div class="sides"><div class="chosen">chosen<pre>{chosen}</pre></div>'
        f'<div class="rejected">rejected<pre>{rejected}</pre></div></div></article>'
    )
