"""What the quality figures of token rewards are, as numbers, as lines of text and as JSON."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

ALPHAS = (0.1, 0.25, 0.5, 1.0, 2.0)  # the paper's search, and on to where a factor may reach 0
QUANTILES = (5, 25, 50, 75, 95)  # percent
MERE_COPYING = 0.02  # mean |r| below which the reference model does not distinguish better from worse
NEAR_ZERO = 0.01
CONFIDENCE = 0.95

_COPYING_WARNING = (
    "The rewards are near 0 (mean size {:.4f}), and training on them is close to plain preference optimization. Of "
    "contrastive prompts: the reference model gives the response nearly the same probability under both. Small models "
    "do this with `revise`, which shows them the response to copy; try the prompt pair few_shot or answer, or a larger "
    "reference model. Of a log-ratio: the two models hardly differ; raise label.ratio_scale, or train the better one "
    "longer."
)
_CONTRARY_WARNING = (
    "Chosen responses have a lower mean reward ({:+.4f}) than rejected ones ({:+.4f}): the token rewards contradict "
    "the preferences. Look at the pairs, and try another prompt pair or source, before you train on them."
)


class Correlation(NamedTuple):
    """Pearson's correlation, and Spearman's, which asks for a common order only; nan if unknown."""

    pearson: float
    spearman: float


class Agreement(NamedTuple):
    """How often the chosen response has more than the rejected one.

    Attributes:
        share: fraction of the pairs; a tie is not more.
        interval: Wilson's, at :data:`CONFIDENCE`. It takes pairs as independent.
        ties: number of pairs whose responses have equally much.
    """

    share: float
    interval: tuple[float, float]
    ties: int


class ScoreGap(NamedTuple):
    """Spearman's correlation of chosen minus rejected score with chosen minus rejected reward, over ``pairs`` pairs."""

    pairs: int
    of_mean: float
    of_sum: float


class Factors(NamedTuple):
    """How alpha distributes the gradient: factors 1 + alpha r_t of chosen tokens, 1 - alpha r_t of rejected ones.

    Attributes:
        alpha: objective.alpha.
        quantiles: of the factors, at :data:`QUANTILES`.
        beyond_tenth: fraction of the tokens whose factor is more than 0.1 away from 1.
        beyond_quarter: more than 0.25, as ``treg/factor_outside_quarter`` counts them while training.
    """

    alpha: float
    quantiles: tuple[float, ...]
    beyond_tenth: float
    beyond_quarter: float


@dataclass(frozen=True)
class Quality:
    """Figures of one source of token rewards.

    Attributes:
        mean_abs: mean of |r_t|.
        near_zero: fraction of the tokens with |r_t| below :data:`NEAR_ZERO`.
        half_of_mass, ninety_of_mass: smallest fraction of the tokens that holds half, or 90 %, of the sum of |r_t|.
        mass: fraction of that sum in the largest 0, 1, ..., 100 % of the tokens.
        chosen_mean, rejected_mean: mean of r_t over the tokens of one side.
        mean_agreement, sum_agreement: by a response's mean and by its sum of r_t.
        score_gap: agreement with the scores of the pairs that have them.
        surprisal: correlation of r_t with -log pi_ref(y_t | x, y_<t).
        position, relative_position: with t from 0, and with t / (n - 1) in a response of n tokens.
        length: correlation of a response's mean with its number of scored tokens.
        by_surprisal, by_relative_position: mean of the latter and of r_t in each tenth of the tokens in its order.
        favoured: percentiles 0, 1, ..., 100 of r_t in chosen and -r_t in rejected responses, which alpha multiplies.
        factors: for each of :data:`ALPHAS`.
    """

    mean_abs: float
    near_zero: float
    half_of_mass: float
    ninety_of_mass: float
    mass: tuple[float, ...]
    chosen_mean: float
    rejected_mean: float
    mean_agreement: Agreement
    sum_agreement: Agreement
    score_gap: ScoreGap
    surprisal: Correlation
    position: Correlation
    relative_position: Correlation
    length: Correlation
    by_surprisal: tuple[tuple[float, float], ...]
    by_relative_position: tuple[tuple[float, float], ...]
    favoured: tuple[float, ...]
    factors: tuple[Factors, ...]

    @property
    def warnings(self) -> list[str]:
        """What the figures warn of, one paragraph each."""
        warnings = []
        if self.mean_abs < MERE_COPYING:
            warnings.append(_COPYING_WARNING.format(self.mean_abs))
        if self.chosen_mean < self.rejected_mean and self.mean_agreement.share < 0.5:
            warnings.append(_CONTRARY_WARNING.format(self.chosen_mean, self.rejected_mean))
        return warnings

    def lines(self) -> list[tuple[str, str]]:
        """Name and formatted value of each figure."""
        percents = ", ".join(map(str, QUANTILES))
        return [
            ("mean size of a reward", f"{self.mean_abs:.4f}"),
            (f"share within ±{NEAR_ZERO}", f"{self.near_zero:.1%}"),
            ("share that holds half of their total size", _share(self.half_of_mass)),
            ("share that holds 90 % of it", _share(self.ninety_of_mass)),
            ("mean reward, chosen", f"{self.chosen_mean:+.4f}"),
            ("mean reward, rejected", f"{self.rejected_mean:+.4f}"),
            ("pairs whose chosen response has the higher mean", _agreement(self.mean_agreement)),
            ("pairs whose chosen response has the higher sum", _agreement(self.sum_agreement)),
            ("rank correlation of the gap in score with that in mean, sum", _score_gap(self.score_gap)),
            ("correlation with surprisal, by rank", _both(self.surprisal)),
            ("correlation with position, by rank", _both(self.position)),
            ("correlation with relative position, by rank", _both(self.relative_position)),
            ("correlation of a response's mean with its length", _both(self.length)),
            *(
                line
                for alpha, quantiles, beyond_tenth, beyond_quarter in self.factors
                for line in (
                    (
                        f"gradient factors at alpha {alpha:g}: {percents} %",
                        ", ".join(f"{factor:.3f}" for factor in quantiles),
                    ),
                    (
                        f"gradient factors at alpha {alpha:g}: beyond 1 ± 0.1, ± 0.25",
                        f"{beyond_tenth:.1%}, {beyond_quarter:.1%}",
                    ),
                )
            ),
        ]


@dataclass(frozen=True)
class Figures:
    """Quality of each source of token rewards that labelled pairs hold.

    Attributes:
        pairs, tokens: how many labelled pairs, and scored response tokens of both sides.
        sampled: how many tokens, drawn at random, quantiles, curves and rank correlations of tokens rest on.
        rewards: by the name of the source, the one to train on first.
        between: correlation of every two sources, over the tokens.
    """

    pairs: int
    tokens: int
    sampled: int
    rewards: Mapping[str, Quality]
    between: Mapping[tuple[str, str], Correlation]

    @property
    def main(self) -> Quality:
        """The quality of the first source."""
        return next(iter(self.rewards.values()))

    @property
    def warnings(self) -> list[str]:
        """Warnings of every source, with its name if there are several."""
        return [
            f"{name}: {warning}" if len(self.rewards) > 1 else warning
            for name, quality in self.rewards.items()
            for warning in quality.warnings
        ]

    def lines(self) -> list[tuple[str, ...]]:
        """Name of each figure, and its formatted value for each source; one value alone where it is of no source."""
        sampled = "all" if self.sampled == self.tokens else f"{self.sampled:,} at random"
        lines: list[tuple[str, ...]] = [
            ("pairs", f"{self.pairs:,}"),
            ("response tokens", f"{self.tokens:,}"),
            ("tokens in quantiles, curves and ranks", sampled),
        ]
        if len(self.rewards) > 1:
            lines.append(("", *self.rewards))
        for each in zip(*(quality.lines() for quality in self.rewards.values()), strict=True):
            lines.append((each[0][0], *(value for _, value in each)))
        for (first, second), correlation in self.between.items():
            lines.append((f"correlation of {first} with {second}", _both(correlation)))
        return lines

    def as_json(self) -> dict[str, Any]:
        """Every figure and curve as JSON values; null where one is unknown."""
        between = [
            {"first": first, "second": second, **correlation._asdict()}
            for (first, second), correlation in self.between.items()
        ]
        rewards = {name: _as_json(quality) for name, quality in self.rewards.items()}
        return {
            "pairs": self.pairs,
            "tokens": self.tokens,
            "sampled_tokens": self.sampled,
            "confidence": CONFIDENCE,
            "quantiles": [percent / 100 for percent in QUANTILES],
            "rewards": rewards,
            "between": _as_json(between),
        }


def wilson_interval(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Interval of a probability from independent trials, at least one (Wilson, JASA 22, 1927)."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def shown_correlation(correlation: float) -> str:
    """A correlation as text."""
    return "unknown" if math.isnan(correlation) else f"{correlation:+.2f}"


def _as_json(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _as_json(value._asdict())
    if isinstance(value, dict):
        return {name: _as_json(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _share(fraction: float) -> str:
    return "unknown" if math.isnan(fraction) else f"{fraction:.1%}"


def _both(correlation: Correlation) -> str:
    return f"{shown_correlation(correlation.pearson)}, {shown_correlation(correlation.spearman)}"


def _agreement(agreement: Agreement) -> str:
    low, high = agreement.interval
    return f"{agreement.share:.1%} [{low:.1%}, {high:.1%}]"


def _score_gap(gap: ScoreGap) -> str:
    if not gap.pairs:
        return "no scores"
    return f"{shown_correlation(gap.of_mean)}, {shown_correlation(gap.of_sum)} ({gap.pairs:,} pairs)"
