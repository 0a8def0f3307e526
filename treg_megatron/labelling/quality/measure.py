"""The quality figures of labelled pairs, however many: sums over all tokens, and a sample for what is sorted."""

import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from treg_megatron.data.labelled_pairs import SIDES, LabelledPair
from treg_megatron.data.scored import is_scored
from treg_megatron.errors import UserError
from treg_megatron.labelling.quality.correlation import Correlations, correlations, rank_correlations
from treg_megatron.labelling.quality.figures import (
    ALPHAS,
    NEAR_ZERO,
    QUANTILES,
    Agreement,
    Correlation,
    Factors,
    Figures,
    Quality,
    ScoreGap,
    wilson_interval,
)
from treg_megatron.labelling.quality.token_sample import TokenSample
from treg_megatron.utils.parallel import batches

#: name of a source -> side -> token rewards of a response, [n] fp32
Rewards = Mapping[str, Mapping[str, np.ndarray]]

MAIN = "token_rewards"
SAMPLED_TOKENS = 1_000_000
_PAIRS_AT_ONCE = 128
_FEATURES = ("surprisal", "position", "relative_position")
_TENTHS = 10


def rewards_by_name(pair: LabelledPair) -> dict[str, dict[str, np.ndarray]]:
    """The token rewards that a labelled pair holds, by the name of their source."""
    named = {name: {side: getattr(pair, f"{side}_values")[name] for side in SIDES} for name in pair.chosen_values}
    return {MAIN: {side: getattr(pair, f"{side}_token_rewards") for side in SIDES}, **named}


def measure(pairs: Iterable[LabelledPair]) -> Figures:
    """The figures of one or more labelled pairs; see :func:`measure_rewards`."""
    return measure_rewards((pair, rewards_by_name(pair)) for pair in pairs)


def compare_sources(sources: Mapping[str, Iterable[LabelledPair]]) -> Figures:
    """The figures of several labellings of the same pairs, by the name of each.

    Scores, reference log-probs and what is scored are the first one's.

    Raises:
        UserError: they are not of the same responses in the same order.
    """

    def rows() -> Iterator[tuple[LabelledPair, Rewards]]:
        for pairs in itertools.zip_longest(*sources.values()):
            if None in pairs or any(not _same_responses(pairs[0], pair) for pair in pairs[1:]):
                ids = ", ".join(pair.pair_id if pair else "no pair" for pair in pairs)
                raise UserError(f"the labellings {', '.join(sources)} are of different pairs: {ids}")
            yield pairs[0], {n: rewards_by_name(pair)[MAIN] for n, pair in zip(sources, pairs, strict=True)}

    return measure_rewards(rows())


def _same_responses(first: LabelledPair, second: LabelledPair) -> bool:
    return all(
        np.array_equal(getattr(first, f"{side}_tokens"), getattr(second, f"{side}_tokens"))
        and len(getattr(first, f"{side}_token_rewards")) == len(getattr(second, f"{side}_token_rewards"))
        for side in SIDES
    )


def measure_rewards(rows: Iterable[tuple[LabelledPair, Rewards]]) -> Figures:
    """The figures of token rewards of one or more labelled pairs.

    Memory holds a few numbers for each response, and :data:`SAMPLED_TOKENS` tokens.

    Args:
        rows: pairs, each with its rewards from the same sources. The pair says which tokens are scored.
    """
    rows = iter(rows)
    first = next(rows)
    sums = _Sums(tuple(first[1]))
    for batch in batches(itertools.chain([first], rows), _PAIRS_AT_ONCE):
        sums.add(batch)
    return sums.figures()


class _Sums:
    """What the figures need of the tokens and the responses seen so far.

    A token is a row of its rewards by source, its :data:`_FEATURES`, and the sign by which its side favours it.
    """

    def __init__(self, names: tuple[str, ...]):
        self._names = names
        self._correlations = Correlations(len(names) + len(_FEATURES))
        self._sample = TokenSample(SAMPLED_TOKENS)
        self._sizes = np.zeros(len(names))
        self._near_zero = np.zeros(len(names), np.int64)
        self._beyond = np.zeros((2, len(ALPHAS), len(names)), np.int64)
        self._responses: list[np.ndarray] = []  # [pairs, sides, sum by source and number of tokens]
        self._scores: list[np.ndarray] = []  # [pairs, sides]

    def add(self, rows: list[tuple[LabelledPair, Rewards]]) -> None:
        """Take in pairs."""
        tokens, lengths = self._tokens(rows)
        sources = len(self._names)
        self._correlations.add(tokens[:, :-1])
        self._sample.add(tokens.astype(np.float32))
        sizes = np.abs(tokens[:, :sources])
        self._sizes += sizes.sum(axis=0)
        self._near_zero += (sizes < NEAR_ZERO).sum(axis=0)
        for i, alpha in enumerate(ALPHAS):
            for j, distance in enumerate((0.1, 0.25)):
                self._beyond[j, i] += (alpha * sizes > distance).sum(axis=0)
        starts = np.cumsum(lengths) - lengths
        sums = np.add.reduceat(tokens[:, :sources], starts, axis=0)
        self._responses.append(np.column_stack([sums, lengths]).reshape(len(rows), len(SIDES), -1))
        scores = [[getattr(pair, f"{side}_score") for side in SIDES] for pair, _ in rows]
        self._scores.append(np.array(scores, np.float64))

    def _tokens(self, rows: list[tuple[LabelledPair, Rewards]]) -> tuple[np.ndarray, np.ndarray]:
        """The scored tokens, [tokens, columns] float64, and how many of them each response has."""
        responses = [
            _response(pair, side, [rewards[name][side] for name in self._names])
            for pair, rewards in rows
            for side in SIDES
        ]
        return np.concatenate(responses), np.array([len(response) for response in responses])

    def figures(self) -> Figures:
        """The figures of all that was added."""
        responses, scores = np.concatenate(self._responses), np.concatenate(self._scores)
        sample = self._sample.rows()
        pearson, spearman = self._correlations.matrix(), rank_correlations(sample[:, :-1])
        both = [
            [Correlation(float(p), float(s)) for p, s in zip(*row, strict=True)]
            for row in zip(pearson, spearman, strict=True)
        ]
        return Figures(
            pairs=len(responses),
            tokens=self._correlations.count,
            sampled=len(sample),
            rewards={
                name: self._quality(source, responses, scores, sample, both[source])
                for source, name in enumerate(self._names)
            },
            between={
                (self._names[i], self._names[j]): both[i][j]
                for i, j in itertools.combinations(range(len(self._names)), 2)
            },
        )

    def _quality(
        self, source: int, responses: np.ndarray, scores: np.ndarray, sample: np.ndarray, both: list[Correlation]
    ) -> Quality:
        tokens = self._correlations.count
        sums, lengths = responses[:, :, source], responses[:, :, -1]
        means = sums / lengths
        surprisal, position, relative_position = both[len(self._names) :]
        rewards, favour = sample[:, source].astype(np.float64), sample[:, -1]
        features = dict(zip(_FEATURES, sample.T[len(self._names) :], strict=False))
        mass = _mass(np.abs(rewards))
        by_length = np.column_stack([means.ravel(), lengths.ravel()])
        chosen, rejected = sums.sum(axis=0) / lengths.sum(axis=0)
        factors = np.quantile(favour * rewards, np.array(QUANTILES) / 100)
        return Quality(
            mean_abs=float(self._sizes[source] / tokens),
            near_zero=float(self._near_zero[source] / tokens),
            half_of_mass=_holding(mass, 0.5),
            ninety_of_mass=_holding(mass, 0.9),
            mass=_curve(mass),
            chosen_mean=float(chosen),
            rejected_mean=float(rejected),
            mean_agreement=_agreement(means),
            sum_agreement=_agreement(sums),
            score_gap=_score_gap(scores, means, sums),
            surprisal=surprisal,
            position=position,
            relative_position=relative_position,
            length=Correlation(float(correlations(by_length)[0, 1]), float(rank_correlations(by_length)[0, 1])),
            by_surprisal=_tenths(features["surprisal"], rewards),
            by_relative_position=_tenths(features["relative_position"], rewards),
            favoured=tuple(np.quantile(favour * rewards, np.linspace(0, 1, 101)).tolist()),
            factors=tuple(
                Factors(
                    alpha,
                    tuple((1 + alpha * factors).tolist()),
                    *(float(count / tokens) for count in self._beyond[:, i, source]),
                )
                for i, alpha in enumerate(ALPHAS)
            ),
        )


def _response(pair: LabelledPair, side: str, rewards: list[np.ndarray]) -> np.ndarray:
    """The scored tokens of a response, [n, columns] float64."""
    positions = np.flatnonzero(is_scored(getattr(pair, f"{side}_token_rewards")))
    logprobs = getattr(pair, f"{side}_ref_logprobs")
    surprisal = np.full(len(positions), np.nan) if logprobs is None else -logprobs[positions]
    last = max(len(rewards[0]) - 1, 1)
    favour = np.full(len(positions), 1.0 if side == "chosen" else -1.0)
    return np.column_stack([*(values[positions] for values in rewards), surprisal, positions, positions / last, favour])


def _mass(sizes: np.ndarray) -> np.ndarray:
    """Sum of the largest 0, 1, ..., n of n sizes, [n + 1] float64."""
    return np.append(0.0, np.cumsum(np.sort(sizes)[::-1]))


def _curve(mass: np.ndarray) -> tuple[float, ...]:
    """Fraction of the mass in the largest 0, 1, ..., 100 % of the tokens; nan if there is none."""
    if not mass[-1]:
        return (float("nan"),) * 101
    tokens = len(mass) - 1
    return tuple(np.interp(np.linspace(0, tokens, 101), np.arange(tokens + 1), mass / mass[-1]).tolist())


def _holding(mass: np.ndarray, share: float) -> float:
    """Smallest fraction of the tokens that holds a share of the mass; nan if there is none."""
    return float(np.searchsorted(mass, share * mass[-1]) / (len(mass) - 1)) if mass[-1] else float("nan")


def _agreement(values: np.ndarray) -> Agreement:
    """Of values by pair and side, [pairs, 2]."""
    above = int((values[:, 0] > values[:, 1]).sum())
    return Agreement(
        above / len(values), wilson_interval(above, len(values)), int((values[:, 0] == values[:, 1]).sum())
    )


def _score_gap(scores: np.ndarray, means: np.ndarray, sums: np.ndarray) -> ScoreGap:
    gaps = np.column_stack([values[:, 0] - values[:, 1] for values in (scores, means, sums)])
    gaps = gaps[~np.isnan(gaps[:, 0])]
    return ScoreGap(len(gaps), *(rank_correlations(gaps)[0, 1:].tolist() if len(gaps) else [float("nan")] * 2))


def _tenths(feature: np.ndarray, rewards: np.ndarray) -> tuple[tuple[float, float], ...]:
    """Means of the feature and of the rewards in each tenth of the tokens, in the order of the feature."""
    if np.isnan(feature).any():
        return ()
    order = np.argsort(feature, kind="stable")
    parts = [part for part in np.array_split(order, _TENTHS) if len(part)]
    return tuple((float(feature[part].mean(dtype=np.float64)), float(rewards[part].mean())) for part in parts)
