"""The charts of a report, of what there is to show: score against KL, lengths, scores, preferences, training curves."""

from collections.abc import Callable
from typing import Any

from treg_megatron.evaluation.reporting.charts import Curve, Point, Series, curves, distributions, scatter
from treg_megatron.evaluation.reporting.material import BASELINE, Answered, Material, values_over_steps
from treg_megatron.evaluation.reporting.tables import kl_of

_CURVES = (
    ("loss", "loss", "nats"),
    ("rewards/margins", "margin of the implicit reward", "reward"),
    ("rewards/accuracies", "accuracy of the implicit reward", "share of pairs"),
)
_VALIDATION = "validation/"
_SMOOTHED_OVER = 50  # a curve shows about this many means; single steps are noise


def figures(comparison: dict[str, Any], material: Material) -> list[str]:
    """The charts, as HTML."""
    made = [score_against_kl(comparison)]
    models = list(enumerate(material.models))
    judged = models[BASELINE + 1 :]
    tokens = all(answer.tokens is not None for number, _ in models for answer in material.of_model(number))
    unit = "tokens" if tokens else "characters"
    made += [
        _distribution(f"length of the answers, {unit}", unit, material, models, lambda a: getattr(a, unit)),
        _distribution("the judge's scores", "score", material, models, lambda a: a.score),
        _distribution("preference over the baseline", "preference", material, judged, lambda a: a.preference),
    ]
    made += [_training(name, title, label, comparison, material) for name, title, label in _CURVES]
    return [chart for chart in made if chart]


def score_against_kl(comparison: dict[str, Any]) -> str | None:
    """The length-controlled win rate, or the raw one, against the KL divergence of each arm; None below two arms."""
    arms = comparison["arms"]
    controlled = all(arm["length_controlled"] is not None for arm in arms)
    name = "length_controlled" if controlled else "win_rate"
    points = []
    for number, arm in enumerate(arms, 1):
        kl, ends = kl_of(arm)
        if kl is not None:
            points.append(Point(_named(arm), number, kl, arm[name], ends, arm[f"{name}_interval"]))
    if len(points) < 2:
        return None
    label = "length-controlled win rate, %" if controlled else "win rate, %"
    return scatter("score against KL: does more of it still help?", points, "KL, nats a token", label, 50)


def _named(arm: dict[str, Any]) -> str:
    """An arm by its alpha, the study's variable, where the run tells it."""
    alpha = (arm["objective"] or {}).get("alpha")
    return arm["name"] if alpha is None else f"\u03b1 {alpha:g}"


def _distribution(
    title: str,
    label: str,
    material: Material,
    models: list[tuple[int, str]],
    value: Callable[[Answered], float | None],
) -> str | None:
    series = []
    for number, name in models:
        values = [found for answer in material.of_model(number) if (found := value(answer)) is not None]
        if values:
            series.append(Series(name, number, values))
    return distributions(title, series, label) if series else None


def _training(name: str, title: str, label: str, comparison: dict[str, Any], material: Material) -> str | None:
    lines = []
    for number, (arm, records) in enumerate(zip(comparison["arms"], material.curves, strict=True), 1):
        lines.append(Curve(f"{arm['name']}, training", number, _smoothed(values_over_steps(records, name))))
        lines.append(
            Curve(f"{arm['name']}, validation", number, values_over_steps(records, _VALIDATION + name), dashed=True)
        )
    lines = [line for line in lines if len(line.points) > 1]
    if not lines:
        return None
    dashed = " (dashed: validation)" if any(line.dashed for line in lines) else ""
    return curves(f"training: {title}{dashed}", lines, "optimizer step", label)


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over equal numbers of consecutive points."""
    width = max(1, len(points) // _SMOOTHED_OVER)
    parts = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
