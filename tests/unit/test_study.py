"""The miniature study's world, verifier and statistics."""

import dataclasses
import random

import numpy as np
import pytest

from studies.miniature import data, pipeline, verdicts, world
from studies.miniature.bootstrap import Bootstrap, Estimate, adjusted
from studies.miniature.configuration import FORMS, HERE, Reference, form_path, load_study
from studies.miniature.measure import load_arrays
from studies.miniature.model import vocabulary
from studies.miniature.results import Comparison
from studies.miniature.world import OPERATIONS, Task, Writer, fact, verify
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.errors import UserError
from treg_megatron.labelling.prompt_pair import load_prompt_pair
from treg_megatron.objective import Objective

ADD = Task("add", "7", ("3", "9", "0", "5"))
RIGHT = "so 3 makes 1 0 then 9 gives 1 6 next 0 makes 0 7 and 5 is 1 2"


def wrong(answer: str) -> tuple[list[int], bool]:
    """Indices of the tokens marked wrong, and whether the end is right."""
    verdict = verify(ADD, answer)
    return [i for i, right in enumerate(verdict.right) if not right], verdict.end_is_right


@pytest.mark.parametrize(
    "answer, tokens, end, results, edits",
    [
        (RIGHT, [], True, [True] * 4, 0),
        (RIGHT.replace("so", "now").replace("makes", "is"), [], True, [True] * 4, 0),  # free choices
        (RIGHT.replace("1 6", "1 8"), [9], True, [True, False, True, True], 1),
        ("um " + RIGHT, [0], True, [True] * 4, 1),
        (RIGHT.replace("then", "well then"), [5], True, [True] * 4, 1),
        (RIGHT + " um", [20], True, [True] * 4, 1),
        (RIGHT.removesuffix(" 1 2"), [], False, [True, True, True, False], 2),
        (RIGHT.replace("then 9 gives 1 6 ", ""), [], True, [True, False, True, True], 5),
        ("", [], False, [False] * 4, 20),
    ],
)
def test_verifier_by_hand(answer, tokens, end, results, edits):
    assert wrong(answer) == (tokens, end)
    verdict = verify(ADD, answer)
    assert verdict.results == results and verdict.score == pytest.approx(1 - edits / 20)


def test_facts_have_one_wrong_token_and_every_token_has_an_id():
    tokens = set(vocabulary())
    for name, operation in OPERATIONS.items():
        for argument in operation.arguments:
            for item in operation.items:
                found = fact(name, argument, item)
                assert sum(a != b for a, b in zip(found.right, found.popular_error, strict=True)) == 1
                assert {*found.right, *found.popular_error} <= tokens


@pytest.mark.parametrize("error_rate, share", [(0.0, 1.0), (1.0, 0.0)])
def test_writers_are_as_good_as_they_say(error_rate, share):
    draw = random.Random(1)
    verdicts = [verify(ADD, Writer(error_rate, 0.0).answer(ADD, draw)) for _ in range(20)]
    assert np.mean([verdict.results for verdict in verdicts]) == share
    assert all(len(verdict.right) == 20 and sum(verdict.right) == 20 - 4 * (1 - share) for verdict in verdicts)


def test_no_two_splits_share_a_set_of_items():
    shares = {"train": 0.6, "dev": 0.2, "test": 0.2}
    found = world.splits(3, {"train": 300, "dev": 60, "test": 60}, shares)
    contents = {name: {task.content for task in tasks} for name, tasks in found.items()}
    assert [len({task.prompt for task in tasks}) for tasks in found.values()] == [300, 60, 60]
    for one, other in (("train", "dev"), ("train", "test"), ("dev", "test")):
        assert not contents[one] & contents[other]
    assert found == world.splits(3, {"train": 300, "dev": 60, "test": 60}, shares)


def test_the_reference_reads_the_prompts_that_label_it():
    forms = [load_prompt_pair(form_path(form)) for form in FORMS]
    rows = data.reference_records([ADD], 400, forms, 1)
    kinds = {(row["pair_id"].split("-")[0], len(row["prompt"])): row for row in rows}
    assert set(kinds) == {("everyday", 1), *((kind, turns) for kind in ("better", "worse") for turns in (3, 1))}
    for kind, turns, form in (
        (kind, turns, form) for kind in ("better", "worse") for turns, form in zip((3, 1), forms)
    ):
        prompt = kinds[kind, turns]["prompt"]
        words = " ".join(turn["content"] for turn in prompt).split()
        assert ADD.prompt in prompt[0]["content"] and words[-1] == kind and set(words) <= set(vocabulary())
        shown = [getattr(form, kind)([data.Message("user", ADD.prompt)], row) for row in answers_in(prompt)]
        assert prompt in [[message.as_dict() for message in messages] for messages in shown]
    for turns in (3, 1):
        assert (
            verify(ADD, kinds["better", turns]["chosen"]).score
            == 1
            > verify(ADD, kinds["worse", turns]["chosen"]).score
        )
    revisions = [len(row["prompt"]) for row in rows if not row["pair_id"].startswith("everyday")]
    assert 0.4 < np.mean(np.array(revisions) == 3) < 0.6


def answers_in(prompt: list[dict]) -> list[str]:
    """What the revised answer may be: the assistant's turn, or what stands between the task and the request."""
    return [turn["content"].removeprefix(f"User: {ADD.prompt} : ").rpartition(" make it ")[0] for turn in prompt] + [
        turn["content"] for turn in prompt
    ]


def test_marks_of_sampled_ids():
    ids = [vocabulary().index(word) for word in ("um " + RIGHT + " <end>").split()]
    row = {
        "prompt": [{"role": "user", "content": ADD.prompt}],
        "chosen": "um " + RIGHT,
        "chosen_ids": ids,
        "rejected": RIGHT,
        "rejected_ids": ids[1:-3],
    }
    assert data.marks(row, "chosen") == [False] + [True] * 21
    assert data.marks(row, "rejected") == [True] * 18  # cut off: no end to mark
    truth = data.truth_records([row])[0]
    assert truth["chosen_token_rewards"] == [-0.5] + [0.5] * 21 and truth["chosen_token_ids"] == ids


def test_auroc_is_the_share_of_ordered_pairs():
    generator = np.random.default_rng(1)
    scores, positive = generator.integers(0, 6, 60).astype(float), generator.random(60) < 0.4
    prompt, draw = np.repeat(np.arange(6), 10), Bootstrap(1, 1, 6, 200)
    value, drawn = draw.aurocs(scores, positive, prompt)
    assert value == pytest.approx(share_in_order(scores, positive)) and drawn.min() < value < drawn.max()
    for weights, found in zip(draw.prompt_weights[:20], drawn):
        repeated = np.repeat(np.arange(60), np.rint(6 * weights).astype(int)[prompt])
        assert found == pytest.approx(share_in_order(scores[repeated], positive[repeated]))


def share_in_order(scores: np.ndarray, positive: np.ndarray) -> float:
    above, below = scores[positive][:, None], scores[~positive]
    return float(np.mean((above > below) + (above == below) / 2))


@pytest.mark.parametrize(
    "references, by_reference, by_seed, by_prompt, least",
    [(4, 0.0, 0.1, 1.0, 180), (12, 1.0, 0.0, 0.1, 175), (4, 0.0, 1.0, 0.1, 175)],
)
def test_interval_of_a_mean_covers_what_it_should(references, by_reference, by_seed, by_prompt, least):
    """In 200 experiments with a known mean, about 95 % of the intervals contain it, whatever varies."""
    generator, draw = np.random.default_rng(2), Bootstrap(references, 3, 40, 400)
    hits = 0
    for _ in range(200):
        values = (
            by_reference * generator.normal(size=(references, 1, 1))
            + by_seed * generator.normal(size=(references, 3, 1))
            + by_prompt * generator.normal(size=(1, 1, 40))
        )
        found = draw.mean(values)
        assert found.value == pytest.approx(values.mean())
        hits += found.low <= 0 <= found.high
    assert least <= hits <= 199


def test_p_value_is_small_where_the_interval_is_far_from_0_and_not_elsewhere():
    generator, draw = np.random.default_rng(3), Bootstrap(4, 3, 40, 999)
    noise = generator.normal(size=(4, 3, 40))
    noise -= noise.mean()
    assert draw.mean(noise).p > 0.8 and draw.mean(noise + 1).p == draw.mean(noise - 1).p == 2 / 1000


def test_holm_by_hand():
    assert adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted([0.6, 0.5]) == [1.0, 1.0]


def compared(method: str, other: str, value: float, *by_reference: float, half: float = 0.001) -> Comparison:
    """A comparison with intervals of a given half width."""
    score, *single = (Estimate(each, each - half, each + half, 0.5) for each in (value, *by_reference))
    return Comparison(method, other, score, score, single)


@pytest.mark.parametrize(
    "comparison, p, expected",
    [
        (compared("a", "b", 0.01, 0.01, 0.01), 0.01, "higher"),
        (compared("a", "b", -0.01, -0.01, -0.01), 0.01, "lower"),
        (compared("a", "b", 0.01, 0.03, -0.01), 0.01, "higher, not with every reference"),
        (compared("a", "b", 0.01, 0.01, 0.01), 0.05, "undecided"),
    ],
)
def test_verdicts(comparison, p, expected):
    assert verdicts.verdict(comparison, p) == expected


@pytest.mark.parametrize(
    "live, frozen, expected",
    [
        (0.01, 0.01, "that regularised DPO is above it: same order under both readings"),
        (-0.01, -0.01, "that regularised DPO is above it: opposite order under both readings"),
        (
            0.0,
            -0.01,
            "that regularised DPO is above it: undecided under the live one, opposite order under the frozen one",
        ),
    ],
)
def test_the_ablation_is_judged_by_both_readings(live, frozen, expected):
    found = {("dpo_reg", "implicit"): live, ("dpo_reg", "implicit_frozen"): frozen}
    found |= {("implicit", "dpo"): 0.0, ("implicit_frozen", "dpo"): 0.0}
    text = verdicts.ablation({pair: compared(*pair, value, value) for pair, value in found.items()})
    text = " ".join(text.split())
    assert expected in text and "that it is above DPO: undecided under both readings" in text


def test_a_setting_that_diverges_scores_0_in_the_search_and_other_failures_stop_the_study(tmp_path, monkeypatch):
    study = dataclasses.replace(load_study(HERE / "study.yaml"), run=tmp_path)
    reference = study.references[0]
    said = "the loss of step 7 is nan, from the pairs a; no update was made from it, and the last checkpoint is good"

    def diverge(reference, run, folder, log):
        folder.mkdir(parents=True)
        log.parent.mkdir(exist_ok=True)
        log.write_text(said)
        raise UserError("training failed")

    monkeypatch.setattr(pipeline, "_train_and_export", diverge)
    run, other = reference.search_runs[:2]
    pipeline.train_and_measure(reference, run, "dev")
    assert load_arrays(pipeline.result_path(reference, run.name, "dev"))["sampled/score"].mean() == 0
    with pytest.raises(UserError, match="training failed"):
        pipeline.train_and_measure(reference, other, "test")
    said = "no space left"
    with pytest.raises(UserError, match="training failed"):
        pipeline.train_and_measure(reference, reference.search_runs[2], "dev")


def test_the_budget_of_the_search_is_equal():
    study = load_study(HERE / "study.yaml")
    assert {len(grid) for grid in study.grids.values()} == {6}
    assert len(study.references) >= 4 and len(study.seeds) >= 3 and study.search_seed not in study.seeds
    for reference in study.references:
        choice = dict.fromkeys(study.methods, 0)
        names = [run.name for run in (*reference.search_runs, *reference.final_runs(choice))]
        assert len(set(names)) == len(names)


def test_every_method_is_an_objective():
    study, defaults = load_study(HERE / "study.yaml"), section(load_recipe(HERE / "recipe.yaml", []), "objective")
    for run in study.references[0].search_runs:
        changes = {name: value for name, value in run.overrides.items() if name.startswith("objective.")}
        assert "objective.alpha" in changes
        Objective.of(dataclasses.replace(defaults, **{name.split(".")[1]: value for name, value in changes.items()}))


def test_a_result_is_not_that_of_other_settings():
    study = load_study(HERE / "study.yaml")
    grids = study.grids | {"dpo": [{**setting, "optimizer.lr": 0.5} for setting in study.grids["dpo"]]}
    one, other = study.references[0], Reference(dataclasses.replace(study, grids=grids), study.references[0].name)
    for method, keys in study.methods.items():
        assert (one.of(method, 0, 1).name == other.of(method, 0, 1).name) == (keys["grid"] != "dpo")
