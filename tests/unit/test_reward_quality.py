"""Quality figures of token rewards: by hand, against scipy and numpy, and over more tokens than are sorted."""

import dataclasses
import json
import math

import numpy as np
import pytest

from tests.support.labelled import pair as random_pair
from treg_megatron.cli.label import quality_lines
from treg_megatron.data.labelled_pairs import (
    MANIFEST_FORMAT,
    MANIFEST_VERSION,
    SIDES,
    LabelledPair,
    read_labelled,
    write_shard,
)
from treg_megatron.data.scored import NOT_SCORED, is_scored
from treg_megatron.errors import UserError
from treg_megatron.labelling.quality import measure as module
from treg_megatron.labelling.quality.charts import charts
from treg_megatron.labelling.quality.correlation import Correlations
from treg_megatron.labelling.quality.figures import ALPHAS, wilson_interval
from treg_megatron.labelling.quality.measure import MAIN, compare_sources, measure
from treg_megatron.labelling.quality.token_sample import TokenSample
from treg_megatron.utils.files import write_manifest


def labelled(chosen: list[float], rejected: list[float], scores=(None, None), name="by hand") -> LabelledPair:
    columns = {}
    for side, rewards in (("chosen", chosen), ("rejected", rejected)):
        columns[f"{side}_tokens"] = np.arange(len(rewards) + 1, dtype=np.int32)
        columns[f"{side}_token_rewards"] = np.array(rewards, np.float32)
        columns[f"{side}_ref_logprobs"] = -np.arange(1, len(rewards) + 1, dtype=np.float32)
    return LabelledPair(name, **columns, chosen_score=scores[0], rejected_score=scores[1])


BY_HAND = labelled([0.125, -0.3125, 0.3125], [-0.4375, 0.0, 0.03125])


def test_the_mass_by_hand():
    quality = measure([BY_HAND]).main
    mass = 1.21875  # 0.4375, 0.3125, 0.3125, 0.125, 0.03125, 0: half of it are two, 90 % are four
    assert quality.mean_abs == mass / 6 and quality.near_zero == 1 / 6
    assert (quality.half_of_mass, quality.ninety_of_mass) == (2 / 6, 4 / 6)
    assert measure([labelled([0.25], [-0.25])]).main.half_of_mass == 1 / 2  # exactly half, and no more
    assert len(quality.mass) == 101 and (quality.mass[0], quality.mass[100]) == (0, 1)
    assert quality.mass[50] == pytest.approx(1.0625 / mass)
    assert quality.mass[25] == pytest.approx((0.4375 + 0.3125 / 2) / mass)  # one token and a half


def test_named_rewards_stand_beside_the_main_ones(tmp_path):
    named = {side: {"oracle": -getattr(BY_HAND, f"{side}_token_rewards")} for side in SIDES}
    pair = dataclasses.replace(BY_HAND, chosen_values=named["chosen"], rejected_values=named["rejected"])
    figures = measure([pair])
    assert list(figures.rewards) == [MAIN, "oracle"] and figures.between[MAIN, "oracle"].pearson == pytest.approx(-1)
    write_shard(tmp_path / "labels.parquet", [pair])
    shown = measure(read_labelled(tmp_path / "labels.parquet", values="oracle"))  # once, in the place of the main ones
    assert list(shown.rewards) == [MAIN]
    assert shown.main.chosen_mean == pytest.approx(-measure([BY_HAND]).main.chosen_mean)


def test_the_factors_by_hand():
    quality = measure([BY_HAND]).main
    favoured = [0.125, -0.3125, 0.3125, 0.4375, 0.0, -0.03125]  # a rejected token's gradient grows as its reward falls
    assert tuple(factors.alpha for factors in quality.factors) == ALPHAS == (0.1, 0.25, 0.5, 1, 2)
    for factors, tenth, quarter in zip(quality.factors, (0, 1, 3, 4, 4), (0, 0, 0, 3, 3), strict=True):
        expected = 1 + factors.alpha * np.quantile(favoured, [0.05, 0.25, 0.5, 0.75, 0.95])
        assert factors.quantiles == pytest.approx(expected.tolist())
        assert (factors.beyond_tenth, factors.beyond_quarter) == (tenth / 6, quarter / 6)
    assert (quality.favoured[0], quality.favoured[50], quality.favoured[100]) == (-0.3125, 0.0625, 0.4375)


def test_agreement_by_mean_and_by_sum_differ_with_the_length():
    pairs = [
        labelled([0.125] * 6, [0.25] * 2),  # the mean is lower, the sum higher
        labelled([0.25, 0.0], [0.0, 0.25]),  # equal
        labelled([0.5], [0.25]),
        labelled([-0.125] * 4, [-0.25]),  # the mean is higher, the sum lower
    ]
    quality = measure(pairs).main
    assert (quality.mean_agreement.share, quality.mean_agreement.ties) == (2 / 4, 1)
    assert (quality.sum_agreement.share, quality.sum_agreement.ties) == (2 / 4, 1)
    assert quality.sum_agreement.interval == wilson_interval(2, 4)
    first, *others = pairs
    assert measure(others).main.sum_agreement.share == 1 / 3 and measure(others).main.mean_agreement.share == 2 / 3
    assert measure([first]).main.mean_agreement.share == 0 and measure([first]).main.sum_agreement.share == 1


@pytest.mark.parametrize(
    "successes, trials, expected",
    [(81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611)), (1, 29, (0.0061, 0.1718))],
)
def test_wilson_intervals_as_published(successes, trials, expected):
    """Newcombe, Statistics in Medicine 17, 1998, table I, method 3."""
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=5e-5)


def test_scores_are_compared_where_there_are_some():
    def with_gaps(score: float | None, reward: float) -> LabelledPair:
        return labelled([reward, reward], [0.0], (score, None if score is None else 0.0))

    pairs = [with_gaps(4, 0.125), with_gaps(1, 0.25), with_gaps(None, -0.5), with_gaps(2, 0.0625), with_gaps(9, 0.375)]
    gap = measure(pairs).main.score_gap
    # ranks of the scores 3 1 2 4, of the rewards 2 3 1 4
    assert gap.pairs == 4 and gap.of_mean == gap.of_sum == pytest.approx(1 - 6 * (1 + 4 + 1 + 0) / (4 * 15))
    none = measure([BY_HAND])
    assert none.main.score_gap.pairs == 0 and "no scores" in dict(none.lines()).values()


def turns(pair: LabelledPair, random: np.random.Generator) -> LabelledPair:
    """The pair with tokens that are not scored, and rewards on a binary grid, so that ties are exact."""
    rewards = {}
    for side in SIDES:
        values = np.round(8 * getattr(pair, f"{side}_token_rewards")) / 8
        others = random.random(len(values)) < 0.2
        others[0] = False
        rewards[f"{side}_token_rewards"] = np.where(others, NOT_SCORED, values).astype(np.float32)
    return dataclasses.replace(pair, **rewards)


def blurred(pair: LabelledPair, random: np.random.Generator) -> LabelledPair:
    """The pair with smaller rewards and noise on them, also where nothing is scored."""
    rewards = {}
    for side in SIDES:
        values = getattr(pair, f"{side}_token_rewards")
        noise = random.uniform(-0.2, 0.2, len(values))
        rewards[f"{side}_token_rewards"] = np.where(is_scored(values), 0.3 * values + noise, noise).astype(np.float32)
    return dataclasses.replace(pair, **rewards)


@pytest.fixture(scope="module")
def sources() -> dict[str, list[LabelledPair]]:
    """Two labellings of 300 pairs of several turns, more than one batch, with scores."""
    random = np.random.default_rng(1)
    first = [
        dataclasses.replace(
            turns(random_pair(f"p{number}", 3, *random.integers(1, 40, 2)), random),
            chosen_score=float(random.normal()),
            rejected_score=float(random.normal()),
        )
        for number in range(300)
    ]
    return {"first": first, "second": [blurred(pair, random) for pair in first]}


def columns(pairs: list[LabelledPair], values: list[LabelledPair]) -> dict[str, np.ndarray]:
    """Each scored token's reward, surprisal and positions, one response after the other."""
    found = {"reward": [], "surprisal": [], "position": [], "relative_position": [], "sign": []}
    for pair, valued in zip(pairs, values):
        for side in SIDES:
            mask, count = is_scored(getattr(pair, f"{side}_token_rewards")), len(getattr(pair, f"{side}_token_rewards"))
            for t in range(count):
                if mask[t]:
                    found["reward"].append(float(getattr(valued, f"{side}_token_rewards")[t]))
                    found["surprisal"].append(-float(getattr(pair, f"{side}_ref_logprobs")[t]))
                    found["position"].append(t)
                    found["relative_position"].append(t / (count - 1) if count > 1 else 0)
                    found["sign"].append(1 if side == "chosen" else -1)
    return {name: np.array(values) for name, values in found.items()}


def test_every_correlation_is_scipys(sources):
    stats = pytest.importorskip("scipy.stats")
    figures = compare_sources(sources)
    expected = {name: columns(sources["first"], pairs) for name, pairs in sources.items()}
    assert list(figures.rewards) == ["first", "second"] and figures.tokens == len(expected["first"]["reward"])
    for name, of in expected.items():
        for feature in ("surprisal", "position", "relative_position"):
            found = getattr(figures.rewards[name], feature)
            assert found.pearson == pytest.approx(stats.pearsonr(of["reward"], of[feature])[0], abs=1e-9)
            assert found.spearman == pytest.approx(stats.spearmanr(of["reward"], of[feature])[0], abs=1e-6)
    rewards = [of["reward"] for of in expected.values()]
    assert figures.between["first", "second"].pearson == pytest.approx(stats.pearsonr(*rewards)[0], abs=1e-9)
    assert figures.between["first", "second"].spearman == pytest.approx(stats.spearmanr(*rewards)[0], abs=1e-6)
    assert figures.between["first", "second"].pearson > 0.3

    responses = [
        [values[is_scored(values)].astype(np.float64) for values in (p.chosen_token_rewards, p.rejected_token_rewards)]
        for p in sources["first"]
    ]
    scores = [p.chosen_score - p.rejected_score for p in sources["first"]]
    quality = figures.rewards["first"]
    for kind, reduced in (("of_mean", np.mean), ("of_sum", np.sum)):
        gaps = [reduced(chosen) - reduced(rejected) for chosen, rejected in responses]
        assert getattr(quality.score_gap, kind) == pytest.approx(stats.spearmanr(scores, gaps)[0])
    lengths = [len(values) for pair in responses for values in pair]
    means = [values.mean() for pair in responses for values in pair]
    assert quality.length.pearson == pytest.approx(stats.pearsonr(means, lengths)[0])
    low, high = stats.binomtest(round(300 * quality.sum_agreement.share), 300).proportion_ci(method="wilson")
    assert quality.sum_agreement.interval == pytest.approx((low, high))


def test_quantiles_curves_and_means_are_numpys(sources):
    quality = compare_sources(sources).rewards["second"]
    of = columns(sources["first"], sources["second"])
    favoured = of["sign"] * of["reward"]
    assert quality.favoured == pytest.approx(np.quantile(favoured, np.linspace(0, 1, 101)).tolist())
    for factors in quality.factors:
        assert factors.quantiles == pytest.approx(
            (1 + factors.alpha * np.quantile(favoured, [0.05, 0.25, 0.5, 0.75, 0.95])).tolist()
        )
        assert factors.beyond_quarter == np.mean(factors.alpha * np.abs(favoured) > 0.25)
    assert quality.chosen_mean == pytest.approx(of["reward"][of["sign"] > 0].mean())
    assert quality.rejected_mean == pytest.approx(of["reward"][of["sign"] < 0].mean())
    order = np.argsort(of["surprisal"], kind="stable")
    lowest = order[: math.ceil(len(order) / 10)]
    assert quality.by_surprisal[0] == pytest.approx((of["surprisal"][lowest].mean(), of["reward"][lowest].mean()))
    assert len(quality.by_surprisal) == len(quality.by_relative_position) == 10


def test_more_tokens_than_are_sorted(sources, monkeypatch):
    whole = measure(sources["second"])
    monkeypatch.setattr(module, "SAMPLED_TOKENS", 2000)
    part = measure(sources["second"])
    assert whole.sampled == whole.tokens == part.tokens > 10_000 and part.sampled == 2000
    assert ("tokens in quantiles, curves and ranks", "2,000 at random") in part.lines()
    exact = ("mean_abs", "near_zero", "chosen_mean", "sum_agreement", "score_gap", "length")
    assert all(getattr(part.main, name) == getattr(whole.main, name) for name in exact)
    assert part.main.surprisal.pearson == whole.main.surprisal.pearson
    assert [f.beyond_quarter for f in part.main.factors] == [f.beyond_quarter for f in whole.main.factors]
    assert 0 < abs(part.main.surprisal.spearman - whole.main.surprisal.spearman) < 0.1
    assert 0 < abs(part.main.half_of_mass - whole.main.half_of_mass) < 0.05


def test_the_sample_is_uniform_and_does_not_depend_on_the_batches():
    rows = np.arange(100_000, dtype=np.float32)[:, None]

    def sampled(batch: int) -> np.ndarray:
        sample = TokenSample(10_000)
        for start in range(0, len(rows), batch):
            sample.add(rows[start : start + batch])
        return sample.rows()[:, 0]

    drawn = sampled(777)
    assert len(drawn) == 10_000 and (np.diff(drawn) > 0).all()  # each at most once, in order
    np.testing.assert_array_equal(drawn, sampled(100_000))
    tenths = np.histogram(drawn, bins=10, range=(0, len(rows)))[0]
    assert np.abs(tenths - 1000).max() < 5 * math.sqrt(1000 * 0.9 * 0.9)


def test_what_is_unknown_is_said_to_be():
    constant = labelled([0.1, 0.1], [0.1])
    bare = dataclasses.replace(constant, chosen_ref_logprobs=None, rejected_ref_logprobs=None)
    quality = measure([bare, BY_HAND]).main
    assert math.isnan(quality.surprisal.pearson) and math.isnan(quality.surprisal.spearman)
    assert quality.by_surprisal == () and not math.isnan(quality.position.pearson)
    figures = measure([constant] * 50)
    assert all(map(math.isnan, (*figures.main.position, *figures.main.surprisal, *figures.main.length)))
    assert dict(figures.lines())["correlation with position, by rank"] == "unknown, unknown"
    found = json.loads(json.dumps(figures.as_json(), allow_nan=False))["rewards"][MAIN]
    assert found["position"] == {"pearson": None, "spearman": None} and found["sum_agreement"]["ties"] == 0
    nothing = measure([labelled([0.0, 0.0], [0.0])])
    assert math.isnan(nothing.main.half_of_mass)
    titles = [chart["title"] for chart in charts(nothing)]
    assert "where the rewards' total size lies" not in titles and "by surprisal" in titles


def test_a_constant_column_is_one_whatever_its_value():
    for value in np.random.default_rng(3).uniform(-0.5, 0.5, 100):
        sums = Correlations(2)
        for batch in np.array_split(np.arange(700.0), 7):
            sums.add(np.column_stack([np.full(len(batch), value), batch]))
        assert math.isnan(sums.matrix()[0, 1]) and sums.matrix()[1, 1] == pytest.approx(1)


def test_the_figures_as_json_are_those_of_the_text(sources):
    figures = compare_sources(sources)
    found = json.loads(json.dumps(figures.as_json(), allow_nan=False))
    assert found["pairs"] == 300 and list(found["rewards"]) == ["first", "second"]
    quality = found["rewards"]["second"]
    text = {name: values for name, *values in figures.lines()}
    assert text["share that holds 90 % of it"][1] == f"{quality['ninety_of_mass']:.1%}"
    low, high = quality["sum_agreement"]["interval"]
    assert text["pairs whose chosen response has the higher sum"][1] == (
        f"{quality['sum_agreement']['share']:.1%} [{low:.1%}, {high:.1%}]"
    )
    assert [factors["alpha"] for factors in quality["factors"]] == list(ALPHAS)
    [between] = found["between"]
    assert text["correlation of first with second"] == [f"{between['pearson']:+.2f}, {between['spearman']:+.2f}"]
    assert text[""] == ["first", "second"]


def test_labellings_of_different_pairs_are_not_compared(sources):
    first = sources["first"]
    with pytest.raises(UserError, match="a, b are of different pairs: p299, no pair"):
        compare_sources({"a": first, "b": first[:-1]})
    with pytest.raises(UserError, match="different pairs: p0, p1"):
        compare_sources({"a": first, "b": first[1:]})


def test_the_report_on_pairs_tells_how_good_their_finished_labels_are(tmp_path):
    shard = {"file": "shard-00000.parquet", "pairs": 1}
    write_shard(tmp_path / shard["file"], [BY_HAND], {"run": {}})
    assert list(quality_lines(str(tmp_path))) == []  # another process may still be labelling
    write_manifest(tmp_path / "manifest.json", MANIFEST_FORMAT, MANIFEST_VERSION, {"run": {}, "shards": [shard]})
    first, *lines = quality_lines(str(tmp_path))
    assert first == f"\ntoken rewards in {tmp_path}:"
    assert [line.split("  ")[0] for line in lines] == [name for name, *_ in measure([BY_HAND]).lines()]
