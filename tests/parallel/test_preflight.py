"""Preflight of a sample of the recipes on their stated clusters, and of recipes that cannot work; real models on meta
tensors."""

import json
import re
from pathlib import Path

import pytest

from tests.support.forked import run_ranks
from tests.support.new_recipes import new_recipe
from tests.support.preflights import RECIPES, preflight
from tests.support.published import PUBLISHED
from tests.unit.test_config_corpus import PUBLISHED as CORPUS
from treg_megatron.config import recipe_table
from treg_megatron.config.recipe import load_recipe
from treg_megatron.errors import UserError

#: of the recipes; `make test-recipes` has them all
SAMPLE = ("smollm2_135m", "llama3_8b", "gemma2_9b", "mixtral_8x7b", "llama3_70b")
ROWS = {row.recipe: row for row in recipe_table.read()}


def row_in_this_process(name: str):
    from treg_megatron.preflight import table

    return table.row(name)


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(AssertionError) as error:
        preflight(name, *overrides)
    last = str(error.value).strip().splitlines()[-1]
    assert UserError.__name__ in last, error.value
    return last


@pytest.mark.parametrize("name", SAMPLE)
def test_a_recipe_fits_its_stated_cluster_and_has_the_published_parameters(name):
    done = preflight(name)
    assert done.code == 0 and "verdict: fits" in done.printed, done.printed
    assert f"{PUBLISHED[name]:,} parameters, all trained" in done.printed
    assert done.cpu_seconds < 60 and done.grown_gb < 1


@pytest.mark.parametrize(
    "model, parameters, layout",
    [
        (
            "Qwen3-30B-A3B",
            30_532_122_624,
            ["parallel.tensor=1", "parallel.sequence=false", "parallel.expert=64", "cluster.nodes=8"],
        ),
        ("phi-4", 14_659_507_200, []),
        ("gemma-3-27b, text", 27_009_346_304, []),
        ("granite-8b-code-base-4k", 8_054_910_976, []),
    ],
)
def test_the_parameters_of_a_published_config_are_counted(model, parameters, layout, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CORPUS[model]))
    done = preflight("llama3_8b", f"model.architecture={tmp_path}/config.json", *layout)
    assert f"{parameters:,} parameters, all trained" in done.printed


def test_a_recipe_with_adapters_fits_and_trains_only_them():
    done = preflight("llama3_8b_lora")
    assert done.code == 0 and done.cpu_seconds < 60 and done.grown_gb < 1, done.printed
    total, adapters = (
        int(count.replace(",", ""))
        for count in re.search(r"([\d,]+) parameters, ([\d,]+) of them in adapters", done.printed).groups()
    )
    assert total - adapters == PUBLISHED["llama3_8b"]


@pytest.mark.parametrize("name", ["llama3_8b", "qwen2.5_0.5b"])
def test_the_table_of_recipes_is_what_preflight_says_now(name):
    assert run_ranks(1, row_in_this_process, name)[0] == ROWS[name], "make recipes-table"


def bound_and_built_in_this_process(name: str) -> tuple[float, float]:
    from treg_megatron.preflight import search
    from treg_megatron.preflight.plan import make_plan, sections_of

    sections = sections_of(load_recipe(RECIPES / f"{name}.yaml"))
    return search.bound(sections), make_plan(sections, stages=[0]).stages[0].total


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_70b", "mixtral_8x7b", "llama3_8b_lora"])
def test_the_bound_that_prunes_layouts_is_below_what_is_built_and_not_far(name):
    bound, built = run_ranks(1, bound_and_built_in_this_process, name)[0]
    assert 0.5 * built < bound < built


def test_a_new_recipe_fits_and_says_why(tmp_path):
    path = tmp_path / "mine.yaml"
    assert (
        new_recipe("--config", "qwen3_1.7b", "--gpus-per-node", "4", "--gpu", "a100_40", "--output", str(path)).error
        is None
    )
    text = path.read_text()
    assert "# Layout, by `treg recipe new`: tensor 1, pipeline 1, data 4" in text and "# * memory per stage" in text
    assert "  gpu: a100_40\n" in text and load_recipe(path).name == "mine"
    done = preflight(path)
    assert done.code == 0 and f"{PUBLISHED['qwen3_1.7b']:,} parameters, all trained" in done.printed


def test_a_new_recipe_with_adapters_from_a_folder(tied_run, tmp_path):
    path = tmp_path / "tuned.yaml"
    made = new_recipe("data.seq_length=64", "--config", str(tied_run.hf), "--lora", "--output", str(path))
    assert made.error is None
    assert all(line in path.read_text() for line in ("  rank: 16\n", f"  hf: {tied_run.hf}\n", "  seq_length: 64\n"))


def test_a_new_recipe_that_cannot_fit_names_the_cluster_that_would(tmp_path):
    path = tmp_path / "mine.yaml"
    made = new_recipe("--config", "llama3_70b", "--output", str(path))
    why = r"the leanest layout needs at least \d+ GB per GPU; the smallest cluster of such nodes that fits has \d+"
    assert re.fullmatch(rf"does not fit 1 x 8 GPUs of 80 GB: {why}", made.error)
    assert not path.exists() and made.cpu_seconds < 60


@pytest.mark.parametrize(
    "bandwidth, said",
    [
        (10, r"time limit: Slurm's signal 600 s before it leaves time to finish a step and save it\n"),
        (0.2, r"time limit: Slurm's signal 600 s before it is TOO LATE .*: submit with SBATCH_SIGNAL=USR1@1\d\d0\n"),
    ],
)
def test_a_save_fits_between_the_signal_and_the_time_limit_or_not(bandwidth, said):
    """112 GB of the 8B model: 11 s, or 562 s."""
    assert re.search(said, preflight("llama3_8b", f"cluster.storage_bandwidth={bandwidth}").printed)


def test_the_host_takes_a_part_of_the_optimizer():
    """Of half of 8B, GPUs hold neither fp32 copies nor moments; the host holds 16 bytes per parameter."""

    def stage(printed: str) -> list[float]:
        return [float(value) for value in re.search(r"^ +0((?: +[\d.]+)+)$", printed, re.MULTILINE)[1].split()]

    plain, half = preflight("llama3_8b").printed, preflight("llama3_8b", "optimizer.offload=0.5").printed
    (*same, main, optim), (*unchanged, half_main, half_optim) = stage(plain)[:4], stage(half)[:4]
    assert same == unchanged and main > 2
    assert (half_main, half_optim) == (pytest.approx(main / 2, abs=0.01), pytest.approx(optim / 2, abs=0.01))
    assert "offload:" not in plain
    assert re.search(r"^offload: 64 GB of host memory on a node for the optimizer; with saving \d+", half, re.MULTILINE)


def test_tiny_runs_with_any_model(tied_run):
    done = preflight("tiny", *tied_run.overrides)
    assert done.code == 0
    assert f"{tied_run.hf}: found" in done.printed and "22 pairs" in done.printed, "files that exist are checked"


def test_the_stated_clusters_match_the_headers():
    """The header states the hardware for readers, the section `cluster` for preflight."""
    for path in RECIPES.glob("*.yaml"):
        if path.stem in ("base", "tiny", "smollm2_135m"):
            continue
        cluster, text = load_recipe(path).cluster, " ".join(path.read_text().split("\n#"))
        nodes = f"{cluster.nodes} node{'s' if cluster.nodes > 1 else ''} of {cluster.gpus_per_node}"
        assert nodes in text, f"{path.name} should say {nodes}"


def test_a_thousand_ranks_are_planned_quickly():
    done = preflight("llama3_70b", "cluster.nodes=128", "data.global_batch_size=256")
    assert done.code == 0 and "data 64" in done.printed and done.cpu_seconds < 60


@pytest.mark.parametrize(
    "name, overrides, reason",
    [
        ("llama3_70b", ["parallel.tensor=16"], "tensor=16 does not fit in a node of 8 ranks: .* 1, 2, 4, 8"),
        (
            "llama3_70b",
            ["parallel.pipeline=3", "cluster.nodes=9"],
            "pipeline=3 does not divide the model's 80 layers; .* 4, 5",
        ),
        (
            "llama3_70b",
            ["data.global_batch_size=127"],
            "global_batch_size=127 is not a multiple of .* 4 data-parallel ranks",
        ),
        ("llama3_70b", ["cluster.nodes=3"], "needs a multiple of 16 processes, 24 were started"),
        (
            "llama3_8b",
            ["data.seq_length=16384"],
            "seq_length=16384 exceeds the model's maximum sequence length of 8192 tokens",
        ),
        ("llama3_8b", ["data.layout=bins", "data.micro_batch_size=2"], "micro_batch_size=2 has no effect there"),
        ("llama3_8b", ["objective.alpha=2.5"], "objective.alpha is 2.5: outside .* sign"),
        ("qwen2.5_7b", ["parallel.tensor=8"], "tensor=8 does not divide the model's 28 attention heads; .* 1, 2, 4"),
        ("mixtral_8x7b", ["parallel.expert=3"], "expert=3 does not divide the model's 8 experts; .* 1, 2, 4, 8"),
        ("llama3_8b", ["parallel.expert=2"], "expert=2: the model has no experts"),
        ("llama3_8b", ["cluster.pairs=100"], "100 pairs, fewer than data.global_batch_size=128"),
        ("llama3_8b", ["model.architecture=llama3_9b"], "did you mean llama3_8b"),
        ("llama3_8b", ["model.architecture=null"], "does not exist and model.architecture names no published one"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_with_a_reason(name, overrides, reason):
    assert re.search(reason, refusal(name, *overrides))


def test_another_model_on_disk_than_the_recipe_names_is_refused(tied_run):
    assert "published" in refusal("llama3_8b", f"model.hf={tied_run.hf}")


def test_streams_of_another_tokenizer_are_refused(tied_run, untied_run, tmp_path):
    from tests.support.tiny import tiny_tokenizer

    other = tmp_path / "other"
    tiny_tokenizer(other, vocab=300)
    (other / "config.json").write_text((Path(tied_run.hf) / "config.json").read_text())
    assert "another tokenizer" in refusal("tiny", *tied_run.overrides, f"model.hf={other}")


def test_a_layout_that_does_not_fit_gets_exit_code_1_and_a_remedy():
    done = preflight("llama3_8b", "cluster.gpus_per_node=2", "cluster.gpu_memory=40")
    assert done.code == 1
    assert "verdict: DOES NOT FIT; stage 0 takes" in done.printed
    assert "to make it fit: --nodes 2 with parallel.tensor=" in done.printed


def overrides_in_this_process(*found: str) -> str:
    from treg_megatron.preflight import suggest
    from treg_megatron.preflight.plan import sections_of

    given, changed = (sections_of(load_recipe(RECIPES / "llama3_70b.yaml", keys)) for keys in ([], list(found)))
    return suggest._as_overrides(suggest._layout_of(changed, given))


def test_a_remedy_undoes_what_the_recipe_interleaves():
    found = ["parallel.pipeline=1", "parallel.virtual_pipeline=null", "parallel.tensor=8"]
    layout = "parallel.tensor=8 parallel.pipeline=1 parallel.sequence=true parallel.virtual_pipeline=null"
    assert run_ranks(1, overrides_in_this_process, *found)[0] == f"{layout} train.recompute=none"


def test_a_70b_layout_that_needs_96_gb():
    """The same recipe with two memory sizes: it does not fit into 80 GB, but into 96 GB."""
    tight = ["cluster.nodes=4", "data.seq_length=6144", "parallel.tensor=8", "parallel.virtual_pipeline=null"]
    small, large = (preflight("llama3_70b", *tight, f"cluster.gpu_memory={memory}") for memory in (80, 96))
    assert (small.code, large.code) == (1, 0)
    assert "to make it fit: train.recompute=full" in small.printed


def test_suggestions_fit_and_come_with_their_memory():
    done = preflight("smollm2_135m", "parallel.pipeline=1", suggest=True)
    lines = [line for line in done.printed.splitlines() if " s per step, " in line]
    assert len(lines) > 1
    assert all(float(line.split(" s per step, ")[1].split(" GB")[0]) <= 6 for line in lines)
    steps = [float(line.split()[0]) for line in lines]
    assert steps == sorted(steps)


def test_the_plot_is_a_png(tmp_path):
    done = preflight("smollm2_135m", suggest=False, picture=tmp_path / "memory.png")
    assert done.code == 0
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_every_published_architecture_is_json_of_a_known_family():
    from treg_megatron.models.architecture import PUBLISHED as folder
    from treg_megatron.models.families import family_of

    for path in folder.glob("*.json"):
        assert family_of(json.loads(path.read_text()))
