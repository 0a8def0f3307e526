"""Curves of the quality figures, as the page draws them."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from treg_megatron.labelling.quality.figures import Figures, Quality

_Points = Iterable[tuple[float, float]]


def charts(figures: Figures) -> list[dict[str, Any]]:
    """A chart has ``title``, the names ``x`` and ``y`` of its axes, and ``lines`` of ``name`` and ``points`` [x, y].

    Curves that are unknown are left out, and so are charts without any.
    """
    sources = figures.rewards.items()
    factors = [
        _chart(
            f"factors of the gradient{f', {name}' if len(sources) > 1 else ''}",
            "factor of a token",
            "% of the tokens at or below",
            _factors(quality),
        )
        for name, quality in sources
    ]
    found = [
        _chart(
            "where the rewards' total size lies",
            "largest rewards, % of the tokens",
            "% of the total size",
            {name: enumerate(100 * share for share in quality.mass) for name, quality in sources},
        ),
        *factors,
        _chart(
            "along the response",
            "relative position",
            "mean reward",
            {name: quality.by_relative_position for name, quality in sources},
        ),
        _chart(
            "by surprisal",
            "surprisal, nats",
            "mean reward",
            {name: quality.by_surprisal for name, quality in sources},
        ),
    ]
    return [chart for chart in found if chart["lines"]]


def _factors(quality: Quality) -> dict[str, _Points]:
    return {
        f"alpha {factors.alpha:g}": [(1 + factors.alpha * r, percent) for percent, r in enumerate(quality.favoured)]
        for factors in quality.factors
    }


def _chart(title: str, x: str, y: str, lines: Mapping[str, _Points]) -> dict[str, Any]:
    rounded = {name: [[round(a, 5), round(b, 5)] for a, b in points] for name, points in lines.items()}
    known = {name: points for name, points in rounded.items() if points and not math.isnan(points[-1][1])}
    return {"title": title, "x": x, "y": y, "lines": [{"name": n, "points": p} for n, p in known.items()]}
