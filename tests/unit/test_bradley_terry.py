"""Arena-Hard's scores against a logistic regression, and its rules for verdicts."""

import numpy as np
import pytest

from treg_megatron.evaluation.comparison.bradley_terry import Game, game, score, score_interval

VERDICTS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")


def _games(generator, count, chances):
    return [game(str(v), bool(first)) for v, first in zip(generator.choice(VERDICTS, count, p=chances), [0, 1] * count)]


@pytest.mark.slow
def test_the_score_is_the_strength_that_a_bradley_terry_regression_finds():
    """Two models against one baseline, fitted together as arena-hard-auto v0.1 does: ties as half a win each."""
    from scipy.optimize import minimize

    generator = np.random.default_rng(0)
    models = [
        _games(generator, 300, [0.1, 0.2, 0.2, 0.2, 0.3]),
        _games(generator, 200, [0.4, 0.1, 0.1, 0.2, 0.2]),
    ]

    def loss(strengths):  # of the baseline and the two models, under a prior too weak to matter
        total = 1e-9 * (strengths**2).sum()
        for strength, games in zip(strengths[1:], models):
            margin = strength - strengths[0]
            for points, times in games:
                total += times * (points * np.logaddexp(0, -margin) + (1 - points) * np.logaddexp(0, margin))
        return total

    fitted = minimize(loss, np.zeros(3), tol=1e-12).x
    for strength, games in zip(fitted[1:], models):
        assert score(games) == pytest.approx(100 / (1 + np.exp(fitted[0] - strength)), abs=1e-3)


@pytest.mark.parametrize(
    ("verdict", "arm_first", "expected"),
    [
        ("A>>B", True, Game(1.0, 3)),
        ("A>>B", False, Game(0.0, 3)),
        ("A>B", True, Game(1.0, 1)),
        ("A=B", False, Game(0.5, 1)),
        ("B>A", False, Game(1.0, 1)),
        ("B>>A", True, Game(0.0, 3)),
        ("A<<B", False, Game(1.0, 3)),
        ("", True, None),
        (None, True, None),
        ("A>>>B", True, None),
    ],
)
def test_verdicts(verdict, arm_first, expected):
    assert game(verdict, arm_first) == expected


def test_a_clear_verdict_counts_as_three_games():
    assert score([Game(1.0, 3), Game(0.0, 1)]) == 75.0
    assert score([Game(0.5, 1)]) == 50.0


@pytest.mark.slow
def test_the_interval_is_that_of_drawing_games():
    """Drawn one by one here; the repetitions of a clear verdict are games of their own, as in arena-hard-auto."""
    games = _games(np.random.default_rng(5), 400, [0.1, 0.2, 0.2, 0.2, 0.3])
    points = np.repeat([one.points for one in games], [one.times for one in games])
    generator = np.random.default_rng(6)
    drawn = 100 * points[generator.integers(len(points), size=(20_000, len(points)))].mean(1)
    assert score_interval(games) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.15)
