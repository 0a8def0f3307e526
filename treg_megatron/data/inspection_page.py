"""The report of ``inspect`` as one HTML file without scripts: counts, histograms, writing systems, examples."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from treg_megatron.data.inspection import as_lines
from treg_megatron.utils.files import atomic_write
from treg_megatron.utils.terminal import without_control_bytes

_WIDTH, _HEIGHT = 320, 90  # of a histogram, in CSS pixels

_TEMPLATE = Path(__file__).resolve().with_name("inspection.html")


def write_page(path: str | Path, source: str, report: Mapping[str, Any]) -> None:
    """Write the report of :func:`~treg_megatron.data.inspection.inspect_pairs` as a page.

    Raises:
        UserError: the file cannot be written.
    """
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        source=escape(source),
        warnings="".join(f'<p class="warning">{escape(warning)}</p>' for warning in report["warnings"]),
        lines="".join(f"<li>{escape(without_control_bytes(line))}</li>" for line in as_lines(report)),
        histograms="".join(_histogram(name, **values) for name, values in report["histograms"].items()),
        scripts=escape(", ".join(f"{name.lower()} in {count}" for name, count in report["scripts"].items())),
        as_what="as tokens decode" if report["unit"] == "tokens" else "without a chat template",
        examples="".join(map(_example, report["examples"])) or "<p>none</p>",
    )
    with atomic_write(path) as partial:
        partial.write_text(page, encoding="utf-8")


def _histogram(name: str, low: float, high: float, counts: Sequence[int]) -> str:
    step, most = _WIDTH / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{_HEIGHT * (1 - count / most):.1f}" width="{step - 1:.1f}" '
        f'height="{_HEIGHT * count / most:.1f}" fill="#2166ac"><title>{count}</title></rect>'
        for i, count in enumerate(counts)
    )
    return (
        f'<figure><svg width="{_WIDTH}" height="{_HEIGHT + 16}" role="img" aria-label="{escape(name)}">{bars}'
        f'<text x="0" y="{_HEIGHT + 13}">{low:g}</text>'
        f'<text x="{_WIDTH}" y="{_HEIGHT + 13}" text-anchor="end">{high:g}</text></svg>'
        f"<figcaption>{escape(name)}</figcaption></figure>"
    )


def _example(example: Mapping[str, Any]) -> str:
    prompt, chosen, rejected = (
        escape(without_control_bytes(example[name])) for name in ("prompt", "chosen", "rejected")
    )
    return (
        f"<article><b>{escape(without_control_bytes(example['pair_id']))}</b>, row {example['row']}"
        f"<pre>{prompt}</pre>"
        f'<div class="sides"><div>chosen<pre>{chosen}</pre></div><div>rejected<pre>{rejected}</pre></div></div>'
        "</article>"
    )
