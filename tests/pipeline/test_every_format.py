"""Every preference format from a file to two training steps."""

import json
import math

import pytest

from tests.support.forked import run_ranks
from tests.support.pair_formats import EXAMPLES
from tests.support.tiny import tiny_llama, tiny_tokenizer
from tests.support.training import RECIPE, records, train_on_this_rank


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from treg_megatron.checkpoint.from_hf import import_checkpoint

    folder = tmp_path_factory.mktemp("formats")
    tiny_llama(folder / "hf", vocab=tiny_tokenizer(folder / "hf"))
    import_checkpoint(folder / "hf", folder / "megatron")
    return folder


def test_every_format_is_inspected_labelled_indexed_and_trained_on(model, tmp_path):
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.data.inspection import inspect_pairs
    from treg_megatron.data.pairs import Reading
    from treg_megatron.data.streams import merge_streams
    from treg_megatron.labelling.indexing import index
    from treg_megatron.labelling.job import label

    prefixes = []
    for name, (row, _) in EXAMPLES.items():
        pairs = tmp_path / f"{name}.jsonl"
        pairs.write_text(json.dumps({**row, "id": name}) + "\n")
        assert inspect_pairs(pairs, Reading(name))["pairs"] == 1
        overrides = [f"run={tmp_path}/{name}", f"model.hf={model}/hf", f"label.pairs={pairs}", f"label.format={name}"]
        recipe = load_recipe(RECIPE, overrides)
        assert label(section(recipe, "label"))["pairs"] == 1
        index(section(recipe, "index"))
        prefixes.append(section(recipe, "index").output)
    merged = merge_streams(tmp_path / "all", prefixes)
    assert merged["pairs"] == len(EXAMPLES)
    overrides = [
        f"run={tmp_path}/run",
        f"model.hf={model}/hf",
        f"model.checkpoint={model}/megatron",
        f"data.train={tmp_path}/all",
        "data.validation=null",
        f"data.global_batch_size={len(EXAMPLES) // 2}",
        "train.max_steps=2",
        f"train.output={tmp_path}/out",
    ]
    run_ranks(1, train_on_this_rank, RECIPE, overrides, log=tmp_path / "log")
    losses = [record["loss"] for record in records(tmp_path / "out")]
    # the same pair in every format, so the first loss is the same for each; it falls with the first step
    assert len(losses) == 2 and all(map(math.isfinite, losses)) and losses[1] < losses[0]
