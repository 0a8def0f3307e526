"""Charts as inline SVG. A page's style sheet gives the colours: series n has the classes ``series`` and ``sn``."""

import math
from collections.abc import Sequence
from html import escape as escape
from typing import NamedTuple

from treg_megatron.evaluation.reporting.shown import shown

COLOURS = 8  # of a page's style sheet: s0 to s7

_WIDTH, _HEIGHT = 460, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 20, 10, 38
_BINS = 30
_TICKS = 5


class Series(NamedTuple):
    """A named list of values; ``number`` chooses its colour."""

    name: str
    number: int
    values: Sequence[float]


class Curve(NamedTuple):
    """A named line through points (x, y); ``dashed`` tells a second kind of line of the same colour."""

    name: str
    number: int
    points: Sequence[tuple[float, float]]
    dashed: bool = False


class Point(NamedTuple):
    """A named point with the ends of its intervals."""

    name: str
    number: int
    x: float
    y: float
    x_ends: Sequence[float] | None
    y_ends: Sequence[float] | None


class _Axes:
    """The plane of a chart: ranges, ticks and labels."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str, title: str):
        self.x_ticks, self.y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))
        self._labels, self._title = (x_label, y_label), title

    def x(self, value: float) -> float:
        low, high = self.x_ticks[0], self.x_ticks[-1]
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def line(self, points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)

    def chart(self, marks: str) -> str:
        bottom = _HEIGHT - _BOTTOM
        lines = [
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{self.y(t):.1f}" y2="{self.y(t):.1f}"/>'
            f'<text x="{_LEFT - 6}" y="{self.y(t) + 4:.1f}" text-anchor="end">{_number(t)}</text>'
            for t in self.y_ticks
        ]
        lines += [
            f'<line class="grid" x1="{self.x(t):.1f}" x2="{self.x(t):.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text x="{self.x(t):.1f}" y="{bottom + 16}" text-anchor="middle">{_number(t)}</text>'
            for t in self.x_ticks
        ]
        x_label, y_label = map(_html, self._labels)
        middle = (_TOP + bottom) / 2
        lines.append(
            f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{x_label}'
            f'</text><text class="label" x="12" y="{middle}" text-anchor="middle" '
            f'transform="rotate(-90 12 {middle})">{y_label}</text>'
        )
        return (
            f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_html(self._title)}">'
            f"{''.join(lines)}{marks}</svg>"
        )


def distributions(title: str, series: Sequence[Series], label: str) -> str:
    """The share of values in each of equal bins, as a stepped line per series.

    The last bin also counts the highest percent, which may lie far beyond it.
    """
    values = sorted(value for one in series for value in one.values)
    low, high = values[0], values[min(len(values) - 1, math.ceil(0.99 * len(values)))]
    ticks = nice_ticks(low, high)
    low, high = ticks[0], ticks[-1]
    steps, most = [], 0.0
    for one in series:
        counts = [0] * _BINS
        for value in one.values:
            counts[min(_BINS - 1, max(0, int((value - low) / (high - low) * _BINS)))] += 1
        shares = [100 * count / max(len(one.values), 1) for count in counts]
        most = max(most, *shares)
        edges = [low + (high - low) * place / _BINS for place in range(_BINS + 1)]
        steps.append([(edges[place + end], share) for place, share in enumerate(shares) for end in (0, 1)])
    axes = _Axes([low, high], [0, most], label, "answers, %", title)
    marks = "".join(
        f'<polyline class="series {colour(one.number)}" points="{axes.line(points)}"><title>{_html(one.name)}</title>'
        "</polyline>"
        for one, points in zip(series, steps, strict=True)
    )
    return _figure(title, axes.chart(marks))


def curves(title: str, lines: Sequence[Curve], x_label: str, y_label: str) -> str:
    """Lines through points."""
    points = [point for line in lines for point in line.points]
    axes = _Axes([x for x, _ in points], [y for _, y in points], x_label, y_label, title)
    marks = ""
    for line in lines:
        kind = f"series {colour(line.number)}{' dashed' if line.dashed else ''}"
        marks += (
            f'<polyline class="{kind}" points="{axes.line(line.points)}"><title>{_html(line.name)}</title></polyline>'
        )
    return _figure(title, axes.chart(marks))


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str, level: float | None = None) -> str:
    """Points with their intervals, in the order of x joined by a line; ``level`` is a line across."""
    xs = [x for point in points for x in (point.x, *(point.x_ends or ()))]
    ys = [y for point in points for y in (point.y, *(point.y_ends or ()))]
    axes = _Axes([0, *xs], [*ys, *([] if level is None else [level])], x_label, y_label, title)
    joined = sorted((point.x, point.y) for point in points)
    marks = [f'<polyline class="joined" points="{axes.line(joined)}"/>']
    if level is not None:
        marks.append(f'<polyline class="level" points="{axes.line([(axes.x_ticks[i], level) for i in (0, -1)])}"/>')
    for point in points:
        ends = [(point.x, y) for y in point.y_ends or ()], [(x, point.y) for x in point.x_ends or ()]
        marks += [
            f'<polyline class="series {colour(point.number)}" points="{axes.line(pair)}"/>' for pair in ends if pair
        ]
        x, y = axes.x(point.x), axes.y(point.y)
        place = f'x="{x - 7:.1f}" text-anchor="end"' if x > 0.7 * _WIDTH else f'x="{x + 7:.1f}"'
        marks.append(
            f'<circle class="series {colour(point.number)}" cx="{x:.1f}" cy="{y:.1f}" r="4">'
            f"<title>{_html(point.name)}: {_number(point.x)}, {_number(point.y)}</title></circle>"
            f'<text class="name" {place} y="{y - 6:.1f}">{_html(point.name)}</text>'
        )
    return _figure(title, axes.chart("".join(marks)))


def nice_ticks(low: float, high: float) -> list[float]:
    """About five round numbers, at equal distances, from at most ``low`` to at least ``high``."""
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / _TICKS
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def colour(number: int) -> str:
    """The class of a series' colour."""
    return f"s{number % COLOURS}"


def _figure(title: str, svg: str) -> str:
    return f"<figure><figcaption>{_html(title)}</figcaption>{svg}</figure>"


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "\u2212")


def _html(text: str) -> str:
    return escape(shown(text))
