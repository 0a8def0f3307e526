"""Bootstrap intervals against distributions whose mean is known, and the sign test against its formula."""

import numpy as np
import pytest

from treg_megatron.evaluation.intervals import ROUNDS, interval, mean_interval, resampled_sums, sign_test

pytestmark = pytest.mark.slow

PROMPTS, TRIALS = 500, 1200  # Arena-Hard has 500 prompts, AlpacaEval 805


def _weighted(generator, shape):
    """Preferences as a judge's token probabilities give them: most near 0 or 1, and 0.2 on average."""
    return generator.beta(0.15, 0.6, shape)


def _verdicts(generator, shape):
    return generator.choice([0.0, 0.5, 1.0], p=[0.5, 0.2, 0.3], size=shape)


def _paired(generator, shape):
    """Differences of two arms that agree on 70 % of the prompts."""
    same = generator.random(shape) < 0.7
    return np.where(same, 0.0, generator.beta(0.3, 0.5, shape) - generator.beta(0.3, 0.7, shape))


@pytest.mark.parametrize(
    ("draw", "truth"),
    [(_weighted, 0.2), (_verdicts, 0.4), (_paired, 0.3 * (0.375 - 0.3))],
    ids=["weighted", "verdicts", "paired"],
)
def test_an_interval_of_95_percent_holds_the_truth_as_often(draw, truth):
    """Each trial's resamples are those that ``mean_interval`` draws, since they depend on the number alone."""
    trials = draw(np.random.default_rng(1), (PROMPTS, TRIALS))
    resampled = resampled_sums(trials) / PROMPTS
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    assert (low[0], high[0]) == pytest.approx(mean_interval(trials[:, 0]))
    assert 0.93 <= ((low <= truth) & (truth <= high)).mean() <= 0.97


def test_an_interval_is_the_same_every_time_and_narrows_with_confidence():
    values = _weighted(np.random.default_rng(2), 100)
    assert mean_interval(values) == mean_interval(list(values))
    low, high = mean_interval(values)
    narrow = mean_interval(values, confidence=0.8)
    assert low < narrow[0] < values.mean() < narrow[1] < high


def test_arms_are_resampled_alike():
    values = np.random.default_rng(3).random(50)
    drawn = resampled_sums(np.stack([values, values + 0.1], axis=1))
    assert drawn.shape == (ROUNDS, 2)
    assert np.ptp(drawn[:, 1] - drawn[:, 0]) < 1e-9
    assert interval(drawn[:, 1] - drawn[:, 0]) == pytest.approx((5.0, 5.0))


def test_blocks_do_not_change_what_is_drawn(monkeypatch):
    column = np.arange(30.0)[:, None]
    whole = resampled_sums(column)
    monkeypatch.setattr("treg_megatron.evaluation.intervals._BLOCK", 300)
    assert np.array_equal(resampled_sums(column), whole)


@pytest.mark.parametrize(
    ("wins", "losses", "p"), [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (8, 2, 112 / 1024)]
)
def test_the_sign_test_is_the_exact_binomial_one(wins, losses, p):
    assert sign_test(wins, losses) == pytest.approx(p, rel=1e-12)


def test_the_sign_test_of_many_prompts_does_not_overflow():
    assert 0 < sign_test(2900, 3100) < 0.011
