"""Text on the command line arrives as it was written, whatever YAML or OmegaConf would make of it."""

import pytest

from treg_megatron.cli.arguments import parse_section, section_parser
from treg_megatron.config.recipe import BASE_RECIPE, described, load_recipe, section, trace_recipe, value

pytestmark = pytest.mark.slow

AWKWARD = [
    "OUT/lab #2",
    "1e3",
    "12",
    "0x1F",
    "1_000",
    "yes",
    "off",
    "true",
    "null",
    "~",
    "a: b.jsonl",
    "- a",
    "{a: b}",
    "[a, b]",
    "'quoted'",
    '"quoted',
    "&anchor",
    "*.jsonl",
    "!tag",
    "%a",
    "@a",
    "`a`",
    "a=b",
    " spaces ",
    "two\nlines",
    "${x}.jsonl",
    "${oc.env:HOME}/a",
    "a\\${x}",
    "a\\\\${x}\\b",
    "${",
    "2026-11-26",
    "a,b.jsonl",
    "",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_overrides_of_text_are_literal(text):
    recipe = load_recipe(overrides=[f"label.pairs={text}", f"run={text}"])
    assert (value(recipe, "label.pairs"), value(recipe, "run")) == (text, text)


@pytest.mark.parametrize("text", AWKWARD)
def test_flags_of_text_are_literal(text):
    arguments = section_parser(None, None, "label").parse_args(
        ["--model=M", f"--pairs={text}", "--output", "OUT/lab #2", "--checkpoint=C"]
    )
    label = parse_section(arguments, "label")
    assert (label.pairs, label.output) == (text, "OUT/lab #2")


@pytest.mark.parametrize("text", AWKWARD)
def test_what_is_printed_gives_the_same_text(tmp_path, text):
    printed = tmp_path / "printed.yaml"
    printed.write_text(described(*trace_recipe(BASE_RECIPE, [f"label.pairs={text}"])), encoding="utf-8")
    assert value(load_recipe(printed), "label.pairs") == text


def test_null_is_null_where_a_key_allows_it():
    recipe = load_recipe(overrides=["data.validation=null", "sample.server=yes", "lora.rank=null"])
    assert (recipe.data.validation, recipe.sample.server, recipe.lora.rank) == (None, "yes", None)
    assert load_recipe(overrides=["data.validation="]).data.validation is None


@pytest.mark.parametrize("text", ["[yes, 1e3,a: b]", "yes,1e3,a: b", "['yes', \"1e3\", a: b]"])
def test_lists_of_text_hold_text(text):
    assert section(load_recipe(overrides=[f"lora.targets={text}"]), "lora").targets == ["yes", "1e3", "a: b"]
    assert load_recipe(overrides=["lora.targets=[]"]).lora.targets == []


def test_items_of_a_flag_with_several_words_are_text():
    words = ["a: b", "x,y", "yes", "'q'", "${x}"]
    arguments = section_parser(None, None, "label").parse_args(
        [
            "--model=M",
            "--pairs=P",
            "--output=O",
            "--checkpoint=C",
            "--ignore",
            *words,
            "--columns",
            "prompt=1e3",
            "id=a: b",
        ]
    )
    label = parse_section(arguments, "label")
    assert (label.ignore, label.columns) == (words, {"prompt": "1e3", "id": "a: b"})


@pytest.mark.parametrize(
    "overrides", [["label.columns={prompt: yes, id: 1e3}"], ["label.columns.prompt=yes", "label.columns.id=1e3"]]
)
def test_mappings_of_text_hold_text(overrides):
    assert load_recipe(overrides=overrides).label.columns == {"prompt": "yes", "id": "1e3"}


def test_other_values_and_recipe_files_are_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("defaults: base.yaml\nname: a # b\nrun: runs\nlabel: {output: '${run}/x'}\n")
    recipe = load_recipe(path, ["sample.seeds=[1, 2]", "optimizer.lr=1e-3", "data.share_prompts=yes"])
    assert (recipe.name, value(recipe, "label.output")) == ("a", "runs/x")
    assert (recipe.sample.seeds, recipe.optimizer.lr, recipe.data.share_prompts) == ([1, 2], 1e-3, True)
