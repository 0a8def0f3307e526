"""From pairs to a trained policy on token rewards under a name: the same as on a labelling of these alone."""

import json

import pytest

from tests.support.forked import run_ranks
from tests.support.tiny import perturb, tiny_llama, tiny_pair, tiny_tokenizer
from tests.support.training import RECIPE, records, train_on_this_rank
from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.data.streams import open_streams
from treg_megatron.errors import UserError
from treg_megatron.labelling.indexing import index
from treg_megatron.labelling.job import label


def test_training_on_named_values_equals_training_on_a_labelling_of_their_own(tmp_path):
    """The pairs have weights, and the first preference loss must still be ln 2 times their mean."""
    from treg_megatron.checkpoint.from_hf import import_checkpoint

    for name in ("hf", "oracle"):
        tiny_llama(tmp_path / name, vocab=tiny_tokenizer(tmp_path / name))
    perturb(tmp_path / "oracle")
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron")
    rows = [tiny_pair(i, f"pair {i}") | {"pair_weight": i / 2} for i in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [f"model.hf={tmp_path}/hf", f"model.checkpoint={tmp_path}/megatron", f"label.pairs={tmp_path}/pairs.jsonl"]
    oracle = f"{{source: model_ratio, better_model: {tmp_path}/oracle, ratio_scale: 5.0}}"
    arms = {
        "named": [f"label.values={{oracle: {oracle}, again: {oracle}}}", "objective.values=oracle"],
        "alone": ["label.source=model_ratio", f"label.better_model={tmp_path}/oracle", "label.ratio_scale=5.0"],
    }
    losses = {}
    for name, overrides in arms.items():
        overrides = [f"run={tmp_path}/{name}", *common, *overrides]
        recipe = load_recipe(RECIPE, overrides)
        label(section(recipe, "label"))
        index(section(recipe, "index"))
        overrides += ["data.epochs=2", "data.global_batch_size=4", "objective.alpha=2"]
        run_ranks(1, train_on_this_rank, RECIPE, overrides, log=tmp_path / f"{name}.log")
        steps = records(tmp_path / name / "train")
        losses[name] = [step[of] for of in ("loss", "loss/regularization", "grad_norm") for step in steps]
        assert [step["treg/pair_weight"] for step in steps] == [0.75, 0.75]
    assert len(losses["named"]) == 6 and losses["named"] == pytest.approx(losses["alone"], rel=1e-5)
    prefix = tmp_path / "named" / "streams" / "train"
    main, oracle = (open_streams(prefix, values)[3].chosen_token_rewards for values in (None, "oracle"))
    assert abs(main - oracle).max() > 1e-3
    with pytest.raises(UserError, match="has no token rewards named oracle, only the main ones"):
        open_streams(tmp_path / "alone" / "streams" / "train", "oracle")
