"""Every architecture: a bit-exact round trip to Megatron and back, and the log-probs of transformers in all layouts."""

from pathlib import Path

import pytest
import torch

from tests.support import megatron_model, policy_ranks
from tests.support.checkpoints import assert_same_tensors, certify, config_of
from tests.support.forked import run_ranks
from tests.support.policy_ranks import LAYOUTS, Layout
from tests.support.tiny_families import SPECIAL, VARIANTS, VOCAB, tiny_family, transformers_logprobs
from treg_megatron.checkpoint.from_hf import import_checkpoint
from treg_megatron.checkpoint.layout import read_metadata
from treg_megatron.checkpoint.to_hf import export_checkpoint
from treg_megatron.models.families import family_of, model_fields, name_at, stacked_indices

EVERYWHERE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Mixtral")
CASES = [(family, layout) for family in EVERYWHERE for layout in LAYOUTS if layout != "EP2" or family == "Mixtral"]
# of the same parts as those, in the layouts where each has something to get wrong
MORE_CASES = [
    ("Qwen3Moe", "TP2xPP2", False),
    ("Qwen3Moe", "EP2", True),
    ("Llama biased", "TP2xPP2", False),
    ("Phi3", "TP2xPP2", False),
    ("Gemma3", "TP2xPP2", True),
    *((variant, "TP1", False) for variant in VARIANTS),
]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Function that returns a family's folders (Hugging Face, checkpoint), created once."""
    made = {}

    def folders(family: str, tied: bool, vocab: int = VOCAB) -> tuple[Path, Path]:
        if (family, tied, vocab) not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny_family(folder / "hf", family, tied=tied, vocab=vocab)
            import_checkpoint(folder / "hf", folder / "checkpoint")
            made[family, tied, vocab] = folder / "hf", folder / "checkpoint"
        return made[family, tied, vocab]

    return folders


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "family, layout, tied", [(*case, tied) for tied in (True, False) for case in CASES] + MORE_CASES
)
def test_policy_gives_the_logprobs_of_transformers(imported, tokens, family, layout, tied):
    """With the model used in training, on padded and on packed sequences."""
    hf, checkpoint = imported(family, tied)
    expected = transformers_logprobs(hf, tokens)
    for outputs in run_ranks(LAYOUTS[layout].ranks, score, checkpoint, tokens, LAYOUTS[layout]):
        for actual in outputs or ():
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", EVERYWHERE)
def test_a_vocabulary_without_padding_gives_the_same(imported, tmp_path, tokens, family):
    """512 entries are a multiple of Megatron's padding, even on two ranks."""
    hf, checkpoint = imported(family, False, 512)
    expected = transformers_logprobs(hf, tokens)
    for outputs in run_ranks(2, score, checkpoint, tokens, LAYOUTS["TP2"]):
        for actual in outputs or ():
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    export_checkpoint(checkpoint, hf, tmp_path / "back")
    assert_same_tensors(tmp_path / "back", hf)


@pytest.mark.parametrize(
    "family, layout", [case[:2] for case in [*CASES, *MORE_CASES] if case[1] in ("TP2xPP2", "EP2")]
)
def test_export_of_what_megatron_saved_is_the_original_bit_for_bit(imported, tmp_path, family, layout):
    hf, checkpoint = imported(family, False)
    (tmp_path / "saved" / "weights").mkdir(parents=True)
    run_ranks(LAYOUTS[layout].ranks, load_and_save, checkpoint, LAYOUTS[layout], tmp_path / "saved")
    certify(tmp_path / "saved", read_metadata(checkpoint))
    export_checkpoint(tmp_path / "saved", hf, tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf", hf)


@pytest.mark.parametrize("family", SPECIAL)
def test_parameter_map_names_every_parameter_of_the_policy(imported, family):
    hf, checkpoint = imported(family, False)
    [(names, keys)] = run_ranks(1, parameter_names, checkpoint)
    fields = model_fields(config_of(hf))
    parameters = family_of(config_of(hf)).parameters(fields)
    assert names == {
        name_at(p.local_name or p.name, index) for p in parameters for index in stacked_indices(p.name, fields)
    }
    assert keys == {"module." + p.key for p in parameters}


@pytest.mark.parametrize("family", SPECIAL)
def test_import_then_export_loads_in_transformers_without_a_warning(imported, tmp_path, family):
    from transformers import AutoModelForCausalLM

    hf, checkpoint = imported(family, True)
    export_checkpoint(checkpoint, hf, tmp_path / "back", shard_bytes=50_000)
    assert_same_tensors(tmp_path / "back", hf)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(report.values())
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False).shape[1] > 2


def score(checkpoint: Path, tokens: torch.Tensor, layout: Layout) -> list[torch.Tensor] | None:
    policy = policy_ranks.load(checkpoint, layout)
    outputs = [policy_ranks.token_logprobs(policy, tokens, packed) for packed in (False, True)]
    return None if outputs[0] is None else outputs


def load_and_save(checkpoint: Path, layout: Layout, output: Path) -> None:
    megatron_model.save(policy_ranks.load(checkpoint, layout).module, str(output / "weights"))


def parameter_names(checkpoint: Path) -> tuple[set[str], set[str]]:
    model = policy_ranks.load(checkpoint, Layout()).module
    entries = megatron_model.sharded_state_dict(model)
    keys = {entry.key for name, entry in entries.items() if not name.endswith("_extra_state")}
    return {name for name, _ in model.named_parameters()}, keys


@pytest.mark.parametrize(
    "family, config_class, model_class",
    [
        ("Llama", "Llama31Config", "LlamaModel"),  # with scaled rotary embedding
        ("Mistral", "MistralConfig7B", "MistralModel"),
        ("Qwen2", "Qwen2Config", "Qwen2Model"),
        ("Qwen3", "Qwen3Config", "Qwen3Model"),
        ("Gemma2", "Gemma2Config", "Gemma2Model"),
        ("Mixtral", "MixtralConfig", "MixtralModel"),
        ("Qwen3Moe", "Qwen3MoEConfig", "Qwen3Model"),
        ("Phi3", "Phi3Config", "Phi3Model"),
        ("Gemma3", "Gemma2Config", "Gemma2Model"),
    ],
)
def test_policy_is_of_nemos_classes(family, config_class, model_class):
    hf_config = {"architectures": [f"{family}ForCausalLM"], **SPECIAL[family]}
    assert [c.__name__ for c in family_of(hf_config).nemo_classes(hf_config)] == [config_class, model_class]


def test_llama_without_scaling_is_of_the_plain_config():
    hf_config = {"architectures": ["LlamaForCausalLM"]}
    assert family_of(hf_config).nemo_classes(hf_config)[0].__name__ == "LlamaConfig"


@pytest.mark.parametrize("family", ["Gemma2", "Gemma3"])
def test_interleaved_stages_that_nemo_cannot_build_are_refused(imported, family):
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.errors import UserError
    from treg_megatron.models.build import policy_config

    recipe = load_recipe(overrides=["parallel.pipeline=2", "parallel.virtual_pipeline=2"])
    hf, _ = imported(family, True)
    with pytest.raises(UserError, match="virtual_pipeline=2: NeMo's module of this model builds one chunk"):
        policy_config(config_of(hf), section(recipe, "parallel"), section(recipe, "train"))
