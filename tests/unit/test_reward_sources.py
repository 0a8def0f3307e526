"""Token rewards from the log-ratio of models, and the functions that bring values into [-0.5, 0.5]."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.training import RECIPE
from treg_megatron.config.recipe import load_recipe
from treg_megatron.config.recipe import section as section_of
from treg_megatron.data.labelled_pairs import SIDES, labelling_run, read_labelled
from treg_megatron.errors import UserError
from treg_megatron.labelling.import_rewards import import_token_rewards
from treg_megatron.labelling.job import label
from treg_megatron.labelling.squash import SQUASHES, squashed

pytestmark = pytest.mark.slow

ROWS = [
    {
        "pair_id": f"pair {i}",
        "prompt": f"Question {i}?",
        "chosen": "Yes." + " Indeed." * i,
        "rejected": "No, it is not.",
    }
    for i in range(5)
]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sigmoid", [-0.5, 1 / (1 + np.exp(1)) - 0.5, 0.0, 1 / (1 + np.exp(-2)) - 0.5]),
        ("tanh", [-0.5, np.tanh(-1) / 2, 0.0, np.tanh(2) / 2]),
        ("clip", [-0.5, -0.5, 0.0, 0.5]),
        ("rank", [-0.5, -0.5 + 1 / 3, -0.5 + 2 / 3, 0.5]),
    ],
)
def test_squashed_by_hand(name, expected):
    np.testing.assert_allclose(squashed(np.array([-200.0, -1.0, 0.0, 2.0]), name), expected, atol=1e-7)


def test_equal_values_have_one_rank():
    assert squashed(np.array([3.0, 1.0, 3.0, 9.0, 3.0]), "rank").tolist() == [0.0, -0.5, 0.0, 0.5, 0.0]
    assert squashed(np.array([7.0]), "rank").tolist() == [0.0]
    assert squashed(np.array([7.0, 7.0]), "rank").tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", SQUASHES)
def test_every_squash_is_odd_and_rises(name):
    values = np.random.default_rng(0).normal(0, 3, 200).astype(np.float32)
    rewards = squashed(values, name)
    assert rewards.dtype == np.float32 and np.abs(rewards).max() <= 0.5
    np.testing.assert_allclose(squashed(-values, name), -rewards, atol=1e-7)
    assert (np.diff(rewards[np.argsort(values)]) >= 0).all()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three models with one tokenizer, by name."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("reference", "oracle", "opposite")):
        tiny_llama(root / name, vocab=tiny_tokenizer(root / name), seed=seed)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def section(models, tmp_path):
    """Labels by the log-ratio of the oracle to the reference."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    overrides = [
        f"label.model={models['reference']}",
        f"label.pairs={tmp_path}/pairs.jsonl",
        f"label.output={tmp_path}/labelled",
        "label.source=model_ratio",
        f"label.better_model={models['oracle']}",
        "label.dtype=float32",
        "label.max_length=512",
        "label.shard_pairs=2",
    ]
    return section_of(load_recipe(RECIPE, overrides), "label")


def logps(folder, tokens, response: int) -> np.ndarray:
    """log pi(y_t) of the last ``response`` tokens by plain transformers in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).double()
    ids = torch.tensor(tokens.tolist())
    with torch.no_grad():
        predicted = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return predicted[-response - 1 : -1].gather(-1, ids[-response:, None])[:, 0].numpy()


@pytest.mark.parametrize("worse", ["reference", "opposite"])
def test_rewards_are_the_squashed_log_ratio(section, models, worse):
    if worse == "opposite":
        section.worse_model = str(models["opposite"])
    section.ratio_scale, section.squash = 0.3, "tanh"
    label(section)
    pairs = list(read_labelled(section.output))
    assert [pair.pair_id for pair in pairs] == [row["pair_id"] for row in ROWS]
    for pair in pairs:
        for side in SIDES:
            tokens, rewards = getattr(pair, f"{side}_tokens"), getattr(pair, f"{side}_token_rewards")
            better, against, reference = (
                logps(models[name], tokens, len(rewards)) for name in ("oracle", worse, "reference")
            )
            np.testing.assert_allclose(rewards, np.tanh(0.3 * (better - against)) / 2, atol=1e-5)
            np.testing.assert_allclose(getattr(pair, f"{side}_ref_logprobs"), reference, atol=1e-4)


def test_a_model_over_itself_rewards_nothing(section, models):
    section.better_model = str(models["reference"])
    label(section)
    assert all(
        not getattr(pair, f"{side}_token_rewards").any() for pair in read_labelled(section.output) for side in SIDES
    )


def test_the_run_names_models_scale_and_function(section, models):
    run = label(section)["run"]
    assert "prompt_pair" not in run and labelling_run(section.output) == run
    assert run["source"]["better"]["name"] == "oracle" and "worse" not in run["source"]
    assert (run["source"]["scale"], run["source"]["squash"]) == (1.0, "sigmoid")
    for change in ({"better_model": str(models["opposite"])}, {"ratio_scale": 2.0}, {"squash": "rank"}):
        with pytest.raises(UserError, match="another source"):
            label(dataclasses.replace(section, **change))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"better_model": None}, "label.better_model has no value"),
        ({"ratio_scale": 0.0}, "label.ratio_scale=0.0 must be positive"),
        ({"source": "contrastive_prompts"}, "label.better_model belongs to label.source=model_ratio"),
        (
            {"source": "contrastive_prompts", "better_model": None, "squash": "rank"},
            "label.squash: rewards of contrastive",
        ),
        ({"engine": "megatron"}, "label.better_checkpoint has no value"),
    ],
)
def test_settings_that_do_not_fit_are_refused(section, change, message):
    with pytest.raises(UserError, match=message):
        label(dataclasses.replace(section, **change))


def test_a_model_of_another_tokenizer_is_refused(section, tmp_path):
    tiny_llama(tmp_path / "other", vocab=tiny_tokenizer(tmp_path / "other", vocab=330), seed=5)
    section.better_model = str(tmp_path / "other")
    with pytest.raises(UserError, match="other has another tokenizer than"):
        label(section)


def test_imported_values_of_any_size(section, tmp_path):
    """Squashed as they are given; the end of the turn keeps its 0."""
    row = {
        "prompt": "Why?",
        "chosen": "So it is.",
        "rejected": "No.",
        "chosen_token_texts": ["So", " it is."],
        "chosen_token_rewards": [3.0, -1.0],
        "rejected_spans": [[0, 3, -8.0]],
    }
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="a token reward of 3, outside .*label.squash=sigmoid"):
        import_token_rewards(section, None)
    section.squash = "sigmoid"
    file = import_token_rewards(section, None)["file"]
    [pair] = read_labelled(file)
    assert set(pair.chosen_token_rewards[:-1].tolist()) == {
        np.float32(value) for value in (1 / (1 + np.exp(-3)) - 0.5, 1 / (1 + np.exp(1)) - 0.5)
    }
    assert pair.chosen_token_rewards[-1] == pair.rejected_token_rewards[-1] == 0
    assert pair.rejected_token_rewards[0] == np.float32(1 / (1 + np.exp(8)) - 0.5)
    assert labelling_run(file)["squash"] == "sigmoid"
