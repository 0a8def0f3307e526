"""Recipes: defaults, overrides, messages for wrong keys, and the source of each value."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tests.support.checkpoints import small_checkpoint
from treg_megatron.checkpoint.layout import CheckpointMetadata
from treg_megatron.cli.arguments import recipe_at
from treg_megatron.config.recipe import RENAMED, described, load_recipe, section, trace_recipe
from treg_megatron.config.schema import SECTIONS
from treg_megatron.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yaml") if path.name != "base.yaml")


def resolved(recipe) -> dict:
    return OmegaConf.to_container(recipe, resolve=True)


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_how_it_is_launched_and_names_itself(path):
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    header = [first, *(line for line in rest if line.startswith("#"))]
    assert any(word in first for word in ("torchrun", "srun", "sbatch")) and path.stem in " ".join(header[:2]), first
    assert any("Hardware:" in line for line in header) or path.stem == "tiny"
    assert any("yper-parameters" in line for line in header)
    assert load_recipe(path).name == path.stem


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_repeats_no_default(path):
    """A recipe is a short diff: it sets no key to its default."""
    own = OmegaConf.to_container(OmegaConf.load(path))
    parent = OmegaConf.to_container(load_recipe(path.parent / own.pop("defaults")))
    own.pop("name")
    repeated = [
        f"{name}.{key}" for name, keys in own.items() for key, value in keys.items() if value == parent[name][key]
    ]
    assert repeated == []


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.seq_lenght=3", "the command line: unknown recipe key data.seq_lenght; did you mean data.seq_length?"),
        ("train.lr=1", "unknown recipe key train.lr; did you mean optimizer.lr?"),
        ("dta.seed=1", "unknown recipe key dta; did you mean data?"),
        ("data.seq_length=long", "the command line: data.seq_length: Value 'long'"),
        ("data.seq_length", "not of the form section.key=value"),
        ("data=3", "data must be a mapping of keys"),
        ("data.packing=true", "set data.layout=packed or data.layout=bins"),
        ("label.values.x.sources=own", "unknown recipe key label.values.x.sources; did you mean source?"),
        (
            "label.values={x: {max_length: 3}}",
            "unknown recipe key label.values.x.max_length; known: source, prompt_pair",
        ),
        ("label.values.x=own", "the command line: label.values.x: "),
    ],
)
def test_a_wrong_override_names_the_right_one(override, message):
    with pytest.raises(UserError) as error:
        load_recipe(ROOT / "recipes" / "tiny.yaml", [override])
    assert message in str(error.value)


@pytest.mark.parametrize(
    "text, value",
    [("null", None), ("[]", []), ("<|eot_id|>,</s>", ["<|eot_id|>", "</s>"]), ('["a, b"]', ["a, b"])],
)
def test_a_list_of_texts_that_may_be_null(text, value):
    assert load_recipe(ROOT / "recipes" / "tiny.yaml", [f"evaluate.stop_tokens={text}"]).evaluate.stop_tokens == value


def test_a_wrong_key_names_its_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(f"defaults: {ROOT}/recipes/tiny.yaml\nname: mine\nobjective:\n  alfa: 1\n")
    with pytest.raises(UserError, match="mine.yaml: unknown recipe key objective.alfa; did you mean objective.alpha?"):
        load_recipe(path)


def test_a_value_outside_its_choices_names_them():
    recipe = load_recipe(ROOT / "recipes" / "tiny.yaml", ["train.recompute=some"])
    with pytest.raises(UserError, match="train.recompute is 'some'; choose one of none, selective, full"):
        section(recipe, "train")


def test_simpo_with_a_resident_reference_is_refused():
    with pytest.raises(UserError, match="model.reference; training holds no reference model: .* simpo reads none"):
        load_recipe(ROOT / "recipes" / "gemma2_9b.yaml", ["model.reference=models/gemma-2-9b-it"])


def test_every_value_has_a_source():
    recipe, sources = trace_recipe(ROOT / "recipes" / "llama3_8b_lora.yaml", ["data.seed=7"])
    keys = {f"{name}.{key}" for name in SECTIONS for key in recipe[name]}
    without = {key for key in keys if key not in sources}
    assert without == set()
    assert sources["data.seed"] == "the command line"
    assert sources["lora.rank"].endswith("llama3_8b_lora.yaml")
    assert sources["model.hf"].endswith("llama3_8b.yaml")
    assert sources["optimizer.beta1"].endswith("base.yaml")


def test_what_is_printed_can_be_launched_as_it_is(tmp_path):
    recipe, sources = trace_recipe(ROOT / "recipes" / "gemma2_9b.yaml", ["data.seed=7", "run=elsewhere"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(described(recipe, sources))
    assert resolved(load_recipe(printed)) == resolved(recipe)


def test_the_recipe_of_a_checkpoint_can_be_launched_as_it_is(tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "smollm2_135m.yaml", ["data.seed=7"])
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_000010"
    saved = {"recipe": OmegaConf.to_container(recipe, resolve=False)}
    small_checkpoint(checkpoint, CheckpointMetadata("LlamaForCausalLM", {}, "float32", "source", "test", run=saved))
    OmegaConf.save(recipe, run / "recipe.yaml")
    for path in (checkpoint, run, run / "recipe.yaml"):
        assert resolved(load_recipe(recipe_at(path))) == resolved(recipe)
    with pytest.raises(UserError, match="has no recipe"):
        small_checkpoint(checkpoint, CheckpointMetadata("LlamaForCausalLM", {}, "float32", "source", "import"))
        load_recipe(recipe_at(checkpoint))


def test_entries_of_values_are_text_and_add_up(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: tiny.yaml\nname: mine\nmodel: {hf: M}\nlabel: {pairs: P, values: {a: {source: own}}}\n")
    recipe = load_recipe(path, ["label.values.b.better_model=1e3", "label.values.b.source=model_ratio"])
    entries = section(recipe, "label").values
    assert entries == {"a": {"source": "own"}, "b": {"better_model": "1e3", "source": "model_ratio"}}
    assert section(load_recipe(path, ["objective.values="]), "objective").values is None


def test_a_run_is_not_continued_on_other_token_rewards(tmp_path):
    from treg_megatron.train import resumable

    trained = {"recipe": {"objective": {"values": "oracle"}}}
    metadata = CheckpointMetadata("LlamaForCausalLM", {}, "float32", "source", "test", run=trained)
    small_checkpoint(tmp_path / "checkpoints" / "step_000010", metadata)
    plan = SimpleNamespace(run=SimpleNamespace(output=str(tmp_path)), objective=SimpleNamespace(values="oracle"))
    assert resumable(plan).name == "step_000010"
    plan.objective.values = None
    with pytest.raises(
        UserError, match="was trained with objective.values=oracle, not None: name another train.output"
    ):
        resumable(plan)


@pytest.mark.parametrize("old, new", RENAMED.items())
def test_a_renamed_key_is_refused_with_its_new_name(old, new):
    with pytest.raises(UserError, match=f"{old} is now {new}$"):
        load_recipe(ROOT / "recipes" / "tiny.yaml", [f"{old}=1"])


def test_a_checkpoint_with_renamed_keys_still_gives_its_recipe(tmp_path):
    recipe = load_recipe(ROOT / "recipes" / "smollm2_135m.yaml", ["objective.sft_loss_weight=0.5"])
    recorded = OmegaConf.to_container(recipe, resolve=False)
    for old, new in RENAMED.items():
        section_name, key = old.split(".")
        recorded[section_name][key] = recorded[section_name].pop(new.split(".")[1])
    small_checkpoint(
        tmp_path, CheckpointMetadata("LlamaForCausalLM", {}, "float32", "source", "test", run={"recipe": recorded})
    )
    assert resolved(load_recipe(recipe_at(tmp_path))) == resolved(recipe)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "treg_megatron.train"],
        ["-m", "treg_megatron.preflight"],
        ["tools/label_tokens.py"],
        ["tools/index_pairs.py"],
        ["tools/convert_checkpoint.py", "export"],
        ["tools/sample_responses.py"],
        ["tools/rank_responses.py"],
        ["tools/import_rewards.py"],
    ],
    ids=lambda command: command[-1],
)
def test_every_entry_point_prints_the_recipe(command):
    done = subprocess.run(
        [sys.executable, *command, "--recipe", "recipes/tiny.yaml", "data.seed=7", "--print"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "seed: 7" in done.stdout and "# the command line" in done.stdout and "# recipes/base.yaml" in done.stdout


@pytest.mark.slow
def test_architectures_are_named_by_the_recipes():
    folder = ROOT / "treg_megatron" / "models" / "architectures"
    named = {load_recipe(path).model.architecture for path in RECIPES} - {None}
    assert named == {path.stem for path in folder.glob("*.json")}
    assert all(json.loads(path.read_text())["architectures"] for path in folder.glob("*.json"))
