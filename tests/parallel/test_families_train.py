"""Every architecture in the real trainer on two ranks: losses, gradient norms and weights equal plain PyTorch's."""

from pathlib import Path

import pytest
import torch

from tests.support import reference
from tests.support.forked import run_ranks
from tests.support.tiny import tiny_tokenizer
from tests.support.tiny_families import tiny_family
from tests.support.training import RECIPE, assert_same, records, train_on_this_rank, write_pairs
from treg_megatron.checkpoint.to_hf import export_checkpoint

STEPS = 3
# the layout in which each can fail: Qwen 3's norms see one rank's heads, Gemma 2 scales embeddings on the first stage
LAYOUTS = {
    "Mistral": ["parallel.pipeline=2"],
    "Qwen2": ["parallel.tensor=2"],
    "Qwen3": ["parallel.tensor=2"],
    "Gemma2": ["parallel.pipeline=2"],
    "Gemma2 TP2": ["parallel.tensor=2", "parallel.sequence=true"],
    "Mixtral": ["parallel.tensor=2", "parallel.sequence=true"],
    "Mixtral PP2": ["parallel.pipeline=2"],
    "Mixtral EP2": ["parallel.expert=2"],
    "Qwen3Moe": ["parallel.tensor=2", "parallel.sequence=true"],
    "Qwen3Moe EP2": ["parallel.expert=2"],
    "Llama biased": ["parallel.tensor=2", "parallel.sequence=true"],
    "Phi3": ["parallel.tensor=2"],
    "Gemma3": ["parallel.tensor=2", "parallel.sequence=true", "train.recompute=full"],
}


def prepare(folder: Path, family: str) -> list[str]:
    """Create a random model, labelled pairs, streams and the imported checkpoint; return the recipe overrides."""
    from treg_megatron.checkpoint.from_hf import import_checkpoint
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.labelling.indexing import index
    from treg_megatron.labelling.job import label

    hf = folder / "hf"
    # seed 1: this model's router has no near-ties, so rounding never sends a token to another expert
    tiny_family(hf, family, tied=family in ("Gemma2", "Qwen3"), vocab=tiny_tokenizer(hf), seed=1)
    write_pairs(folder / "train.jsonl", 4 * STEPS)
    overrides = [
        f"run={folder}",
        f"model.hf={hf}",
        f"label.pairs={folder}/train.jsonl",
        "data.validation=null",
        f"train.output={folder}/out",
    ]
    recipe = load_recipe(RECIPE, overrides)
    label(section(recipe, "label"))
    index(section(recipe, "index"))
    import_checkpoint(hf, folder / "megatron")
    return overrides


@pytest.mark.parametrize("case", LAYOUTS)
def test_training_and_export_equal_plain_pytorch(case, tmp_path):
    from transformers import AutoModelForCausalLM

    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.data.sampler import MicrobatchOrder
    from treg_megatron.data.streams import open_streams

    overrides = [
        *prepare(tmp_path, case.removesuffix(" EP2").removesuffix(" PP2").removesuffix(" TP2")),
        *LAYOUTS[case],
    ]
    run_ranks(2, train_on_this_rank, RECIPE, overrides, log=tmp_path / "log")
    recipe = load_recipe(RECIPE, overrides)
    data, objective, optimizer = (section(recipe, name) for name in ("data", "objective", "optimizer"))
    streams = open_streams(data.train)
    order = MicrobatchOrder(len(streams), 1, data.global_batch_size, 0, 1, epochs=1, seed=data.seed)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager").train()
    losses, norms = reference.train(
        model,
        [[streams[i] for i in order.global_batch(step)] for step in range(STEPS)],
        beta=objective.beta,
        alpha=objective.alpha,
        lr=optimizer.lr,
        warmup=round(optimizer.warmup_fraction * STEPS),
        clip=optimizer.clip_grad,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
    )
    found = records(tmp_path / "out")
    assert len(found) == STEPS
    assert found[0]["loss/preference"] == pytest.approx(0.693147, abs=1e-5)
    assert_same([r["loss"] for r in found], losses, rtol=1e-5)
    assert_same([r["grad_norm"] for r in found], norms, rtol=1e-4)
    export_checkpoint(tmp_path / "out", tmp_path / "hf", tmp_path / "trained")
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder).state_dict() for folder in ("hf", "trained")
    )
    # norm over all weights: for gradients near 0, Adam's step depends on rounding
    difference, movement = (
        torch.cat([(weights[name] - expected).flatten() for name, expected in model.state_dict().items()]).norm()
        for weights in (after, before)
    )
    assert difference <= 1e-3 * movement


ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
TARGETS = {"Phi3": ALL, "Llama biased": ALL, "Gemma3": ("linear_qkv", "linear_fc1"), "Qwen3Moe": ALL[:2]}


@pytest.mark.parametrize("family", TARGETS)
def test_exported_adapters_equal_the_trained_policy(family, tmp_path):
    """Merged weights and peft's model give the margins that the run on two ranks reported at its end."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from treg_megatron.checkpoint.to_hf import export_adapter, export_checkpoint
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.data.streams import open_streams

    overrides = [
        *prepare(tmp_path, family),
        *("lora.rank=4", "lora.alpha=16", f"lora.targets=[{','.join(TARGETS[family])}]", "optimizer.lr=1e-2"),
        *("parallel.tensor=2", "parallel.sequence=true"),
    ]
    trained = section(load_recipe(RECIPE, overrides), "data").train
    overrides.append(f"data.validation={trained}")
    run_ranks(2, train_on_this_rank, RECIPE, overrides, log=tmp_path / "log")
    export_checkpoint(tmp_path / "out", tmp_path / "hf", tmp_path / "merged")
    export_adapter(tmp_path / "out", tmp_path / "hf", tmp_path / "adapter")
    beta, streams = section(load_recipe(RECIPE, overrides), "objective").beta, open_streams(trained)
    expected = records(tmp_path / "out", validation=True)[-1]["validation/rewards/margins"]
    for model in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager"),
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager"), tmp_path / "adapter"
        ),
    ):
        margin = reference.mean_margin(model, (streams[i] for i in range(len(streams))), beta)
        assert margin == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 0.05
