"""The miniature study's world, verifier and statistics."""

import dataclasses
import random

import numpy as np
import pytest

from studies.miniature import data, world
from studies.miniature.bootstrap import Bootstrap
from studies.miniature.configuration import HERE, PROMPT_PAIR, load_study
from studies.miniature.model import vocabulary
from studies.miniature.world import OPERATIONS, Task, Writer, fact, verify
from treg_megatron.labelling.prompt_pair import load_prompt_pair

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
    pair = load_prompt_pair(PROMPT_PAIR)
    rows = data.reference_records([ADD], 40, pair, 1)
    kinds = {row["pair_id"].split("-")[0]: row for row in rows}
    assert set(kinds) == {"everyday", "better", "worse"}
    for kind, other in (("better", "worse"), ("worse", "better")):
        turns = kinds[kind]["prompt"]
        assert [turn["role"] for turn in turns] == ["user", "assistant", "user"] and turns[0]["content"] == ADD.prompt
        shown = getattr(pair, kind)([data.Message("user", ADD.prompt)], turns[1]["content"])
        assert [message.as_dict() for message in shown] == turns
        assert turns[-1]["content"] != kinds[other]["prompt"][-1]["content"]
    assert verify(ADD, kinds["better"]["chosen"]).score == 1 > verify(ADD, kinds["worse"]["chosen"]).score


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
    scores, positive = generator.integers(0, 6, (3, 60)).astype(float), generator.random(60) < 0.4
    prompt = np.repeat(np.arange(6), 10)
    found = Bootstrap(3, 6, 200).auroc(scores, positive, prompt)
    by_hand = [
        np.mean((row[positive][:, None] > row[~positive]) + (row[positive][:, None] == row[~positive]) / 2)
        for row in scores
    ]
    assert found.value == pytest.approx(np.mean(by_hand)) and found.low < found.value < found.high
    perfect = Bootstrap(1, 6, 20).auroc(positive[None] * 1.0, positive, prompt)
    assert perfect == (1, 1, 1)


def test_interval_of_a_mean_covers_what_it_should():
    """In 200 experiments with a known mean, about 95 % of the intervals contain it; only prompts vary much."""
    generator, draw = np.random.default_rng(2), Bootstrap(5, 80, 400)
    hits = 0
    for _ in range(200):
        values = generator.normal(size=(1, 80)) + 0.1 * generator.normal(size=(5, 80))
        found = draw.mean(values)
        hits += found.low <= 0 <= found.high
    assert 180 <= hits <= 199


def test_the_budget_of_the_search_is_equal():
    study = load_study(HERE / "study.yaml")
    assert {len(grid) for grid in study.grids.values()} == {8}
    assert len(study.seeds) >= 5 and study.search_seed not in study.seeds
    names = [run.name for run in (*study.search_runs, *study.final_runs({method: 0 for method in study.methods}))]
    assert len(set(names)) == len(names)


def test_a_result_is_not_that_of_other_settings():
    study = load_study(HERE / "study.yaml")
    grids = study.grids | {"dpo": [{**setting, "optimizer.lr": 0.5} for setting in study.grids["dpo"]]}
    other = dataclasses.replace(study, grids=grids)
    for method in study.methods:
        assert (study.of(method, 0, 1).name == other.of(method, 0, 1).name) == (study.methods[method]["grid"] != "dpo")
