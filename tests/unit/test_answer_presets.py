"""Settings of published evaluations: which apply to a model, where each comes from, and what replaces them."""

import dataclasses
import json

import pytest
import yaml

from tests.support.benchmarks import evaluate_section
from treg_megatron.evaluation.answering.presets import FILE, KEYS, answer_settings, family_of
from treg_megatron.tokenizer.chat import load_tokenizer

pytestmark = pytest.mark.slow

PRESETS = yaml.safe_load(FILE.read_text(encoding="utf-8"))


@pytest.fixture
def section(tmp_path):
    plain = evaluate_section(tmp_path, tmp_path / "prompts", tmp_path / "answers")
    return dataclasses.replace(plain, max_new_tokens=None)


def entries():
    for name, settings in PRESETS["benchmarks"].items():
        yield from ((f"{name} {key}", entry) for key, entry in settings.items())
    for name, family in PRESETS["families"].items():
        for settings in (family["settings"], *family["benchmarks"].values()):
            yield from ((f"{name} {key}", entry) for key, entry in settings.items())


@pytest.mark.parametrize("name, entry", list(entries()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_value_has_a_source(name, entry):
    assert set(entry) == {"value", "source"} and len(entry["source"]) > 20
    assert name.split()[1] in KEYS


def test_every_benchmark_has_every_setting():
    for settings in PRESETS["benchmarks"].values():
        assert set(settings) == set(KEYS) - {"stop_tokens"}


@pytest.mark.parametrize(
    "preset, benchmark, expected",
    [
        # SimPO's evaluation of AlpacaEval 2 and Arena-Hard
        ("llama3", "alpaca_eval", (0.9, 1.0, 4096, ("<|end_of_text|>", "<|eot_id|>"))),
        ("gemma2", "alpaca_eval", (0.5, 1.0, 4096, ("<eos>", "<end_of_turn>"))),
        ("mistral", "alpaca_eval", (0.5, 1.0, 2048, ("</s>",))),
        ("mistral_base", "alpaca_eval", (0.7, 1.0, 2048, ("</s>",))),
        ("llama3", "arena_hard_v0.1", (0.0, 1.0, 4096, ("<|end_of_text|>", "<|eot_id|>"))),
        ("mistral", "arena_hard_v0.1", (0.0, 1.0, 4096, ("</s>",))),
        ("qwen", "alpaca_eval", (0.7, 0.8, 3500, ("<|im_end|>", "<|endoftext|>"))),
        ("qwen", "prompts", (0.7, 0.8, 3500, ("<|im_end|>", "<|endoftext|>"))),
        ("none", "alpaca_eval", (0.7, 1.0, 2048, ())),
        ("none", "arena_hard_v2", (0.0, 1.0, 8196, ())),
    ],
)
def test_published_settings(section, chatml, tmp_path, preset, benchmark, expected):
    found = answer_settings(dataclasses.replace(section, preset=preset, benchmark=benchmark), tmp_path, chatml)
    assert (found.temperature, found.top_p, found.max_new_tokens, found.stop_tokens) == expected
    assert found.preset == preset and set(found.sources) == set(KEYS)


def test_mt_bench_has_a_temperature_per_category(section, chatml, tmp_path):
    found = answer_settings(dataclasses.replace(section, benchmark="mt_bench"), tmp_path, chatml)
    temperatures = {name: found.decoding(name, chatml).temperature for name in ("writing", "math", "stem", "new", None)}
    assert temperatures == {"writing": 0.7, "math": 0.0, "stem": 0.1, "new": 0.7, None: 0.7}
    assert found.max_new_tokens == 1024
    given = answer_settings(dataclasses.replace(section, benchmark="mt_bench", temperature=0.3), tmp_path, chatml)
    assert given.decoding("math", chatml).temperature == 0.3


def test_what_the_recipe_says_comes_first(section, chatml, tmp_path):
    own = {"temperature": 0.0, "top_p": 0.9, "max_new_tokens": 5, "stop_tokens": []}
    for key, value in own.items():
        changed = dataclasses.replace(section, preset="llama3", **{key: value})
        found = answer_settings(changed, tmp_path, chatml)
        assert found.as_dict()[key] == value
        assert [k for k, source in found.sources.items() if source == "the recipe"] == [key]
    assert (
        "temperature 0.9 (SimPO, eval/alpacaeval2/configs/Llama-3-Instruct-8B-SimPO.yaml"
        in answer_settings(dataclasses.replace(section, preset="llama3"), tmp_path, chatml).described()
    )


@pytest.mark.parametrize(
    "template, model_type, marker, expected",
    [
        ("chatml", "qwen2", "<|im_start|>", "qwen"),
        ("chatml", "llama", "<|im_start|>", "none"),  # a Llama with ChatML is not Llama 3
        ("turns", "gemma2", "<start_of_turn>", "gemma2"),
        ("headers", "gemma2", "<start_of_turn>", "none"),
        ("headers", None, "", "none"),
    ],
)
def test_a_family_is_told_by_model_type_and_template(
    tokenizer_folders, tmp_path, template, model_type, marker, expected
):
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert family_of(tmp_path, load_tokenizer(tokenizer_folders[template]), PRESETS["families"]) == expected
