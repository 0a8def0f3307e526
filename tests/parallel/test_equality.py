"""Every objective in every layout: loss and gradient of every parameter equal those of a single float64 process.

The policy differs slightly from the reference, so that margins and weights vary. One world per layout takes a step on
each objective in turn, with a learning rate of 0. If several ranks of the layout hold copies of a gradient, these must
agree bit for bit. In every layout the gradient of each log-prob equals the closed form to 1e-6.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import reference
from tests.support.forked import run_ranks
from tests.support.gradients import steps_on_this_rank
from tests.support.objectives import PLAIN_DPO, VARIANTS, WITH_REGULARIZER
from tests.support.tiny import perturb, tiny_llama, tiny_pair, tiny_tokenizer
from tests.support.tiny_families import tiny_family
from tests.support.training import RECIPE, write_pairs
from treg_megatron.distributed import device_labels

PAIRS = 8
BINS = ["data.layout=bins", "data.bin_size=180"]
LAYOUTS = {
    "single": (1, []),
    "micro-batch 8": (1, ["data.micro_batch_size=8"]),
    "padded": (1, ["data.layout=padded", "data.micro_batch_size=2"]),
    "TP2": (2, ["parallel.tensor=2"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "TP2xPP2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "PP2+VPP2": (2, [*BINS, "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "TP2+SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "DP2": (2, []),
    "DP2 bins": (2, BINS),
    "DP2 overlap": (2, ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]),
    "DP2xPP2+VPP2 overlap": (
        4,
        [*BINS, "parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.overlap_grad_reduce=true"],
    ),
    "CP2": (2, ["parallel.context=2"]),
    "CP2xTP2+SP bins": (4, [*BINS, "parallel.context=2", "parallel.tensor=2", "parallel.sequence=true"]),
    "TP2+SP recompute": (2, ["parallel.tensor=2", "parallel.sequence=true", "train.recompute=full"]),
    "shared prompts": (1, ["data.share_prompts=true", "data.micro_batch_size=2"]),
    "shared prompts PP2 bins": (2, [*BINS, "data.share_prompts=true", "parallel.pipeline=2"]),
    "shared prompts TP2xPP2+SP recompute": (
        4,
        [
            "data.share_prompts=true",
            "parallel.tensor=2",
            "parallel.sequence=true",
            "parallel.pipeline=2",
            "train.recompute=full",
        ],
    ),
    "shared prompts PP2+VPP2": (
        2,
        [*BINS, "data.share_prompts=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"],
    ),
}
#: where every objective is tried; the kernels and the other layouts do not touch the loss
EVERY_OBJECTIVE = ("single", "padded", "TP2", "PP2", "TP2xPP2", "PP2+VPP2", "TP2+SP", "DP2", "DP2 bins", "CP2")
SEVERAL_TURNS = ("single", "padded", "TP2", "PP2", "CP2", "DP2 bins", "shared prompts", "CP2xTP2+SP bins")
EXPERTS = {
    "single": (1, []),
    "EP2": (2, ["parallel.expert=2"]),
    "EP2 overlap": (2, ["parallel.expert=2", "parallel.overlap_grad_reduce=true"]),
}
OBJECTIVES = [vars(PLAIN_DPO) | changes for changes in WITH_REGULARIZER]
#: begins with the others; the last weighs the pairs
ALL_OBJECTIVES = [
    *(vars(PLAIN_DPO) | changes for changes in VARIANTS),
    vars(PLAIN_DPO) | dict(alpha=0.5, sft_loss_weight=0.3, pair_weights=True),
]


def prepare(folder: Path, make: Callable[..., object], write: Callable[[Path, int], None] = write_pairs) -> list[str]:
    """Label pairs with one model, import the checkpoint of a similar one, and return the recipe overrides."""
    from treg_megatron.checkpoint.from_hf import import_checkpoint
    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.labelling.indexing import index
    from treg_megatron.labelling.job import label

    for name in ("labeller", "hf"):
        make(folder / name, vocab=tiny_tokenizer(folder / name))
    perturb(folder / "hf")
    write(folder / "train.jsonl", PAIRS)
    overrides = [
        f"run={folder}",
        f"model.hf={folder}/hf",
        f"data.global_batch_size={PAIRS}",
        "data.share_prompts=false",
        f"label.pairs={folder}/train.jsonl",
        f"label.model={folder}/labeller",
    ]
    recipe = load_recipe(RECIPE, overrides)
    label(section(recipe, "label"))
    index(section(recipe, "index"))
    import_checkpoint(folder / "hf", folder / "megatron")
    return overrides


def expected_steps(folder: Path, overrides: list[str], objectives: list[dict] = OBJECTIVES) -> list[dict]:
    """Loss and gradients of each objective, computed by transformers in float64, in Megatron's parameter layout."""
    from transformers import AutoModelForCausalLM

    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.data.streams import open_streams

    streams = open_streams(section(load_recipe(RECIPE, overrides), "data").train)
    pairs = [streams[i] for i in range(len(streams))]
    assert len(pairs) == PAIRS
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", attn_implementation="eager").double().train()
    logps = [reference.pair_logps(model, pair) for pair in pairs]
    steps = []
    for objective in objectives:
        loss = sum(reference.pair_loss(lp, pair, **objective) for lp, pair in zip(logps, pairs)) / PAIRS
        model.zero_grad()
        loss.backward(retain_graph=True)
        steps.append({"loss": loss.item(), "gradients": in_megatron_form(model)})
    return steps


def balancing_loss(router_logits: torch.Tensor, experts_per_token: int) -> torch.Tensor:
    """Router logits of one layer, [tokens, experts] -> experts * sum of (share of the choices) * (mean probability)
    (Switch Transformer, arXiv 2101.03961, eq. 4); the choices count all experts selected per token."""
    tokens, experts = router_logits.shape
    chosen = router_logits.topk(experts_per_token).indices.flatten().bincount(minlength=experts)
    return experts * ((chosen / (tokens * experts_per_token)) * router_logits.softmax(dim=-1).mean(dim=0)).sum()


def expected_step_with_balancing(folder: Path, overrides: list[str], coefficient: float) -> dict:
    """Step of DPO plus the routers' load-balancing loss, averaged over pairs; each pair is one micro-batch."""
    from transformers import AutoModelForCausalLM

    from treg_megatron.config.recipe import load_recipe, section
    from treg_megatron.data.streams import open_streams

    streams = open_streams(section(load_recipe(RECIPE, overrides), "data").train)
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", attn_implementation="eager").double().train()
    total = main = 0.0
    for pair in (streams[i] for i in range(PAIRS)):
        loss = reference.pair_loss(reference.pair_logps(model, pair), pair, **OBJECTIVES[0]) / PAIRS
        both = [
            model(input_ids=torch.tensor(tokens.tolist())[None], output_router_logits=True).router_logits
            for tokens in (pair.chosen_tokens, pair.rejected_tokens)
        ]
        balancing = sum(balancing_loss(torch.cat(layer), model.config.num_experts_per_tok) for layer in zip(*both))
        main = main + loss.item()
        total = total + loss + coefficient * balancing / PAIRS
    total.backward()
    return {"loss": main, "gradients": in_megatron_form(model)}


def in_megatron_form(model) -> dict[str, torch.Tensor]:
    """Gradients of a transformers model by checkpoint key, shaped and interleaved like Megatron's parameters."""
    from treg_megatron.models.families import (
        family_of,
        in_model_order,
        interleaving,
        model_fields,
        parameter_shape,
        stacked_shape,
    )

    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    family, fields = family_of(config), model_fields(config)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    full: dict[str, torch.Tensor] = {}
    for parameter, index in in_model_order(family, fields):
        merged = torch.empty(parameter_shape(parameter, fields), dtype=torch.float64)
        for i, source in enumerate(parameter.sources):
            part = interleaving(parameter, fields).part(merged, i)
            part.copy_(gradients[source.at(index)].view(part.shape))
        stacked = full.setdefault(
            "module." + parameter.key, torch.empty(stacked_shape(parameter, fields), dtype=torch.float64)
        )
        stacked[index] = merged
    return full


def assert_equal_steps(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) > 0
    for objective, ours, theirs in zip(ALL_OBJECTIVES, found, expected):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), objective
        assert ours["gradients"].keys() == theirs["gradients"].keys()
        for name, gradient in theirs["gradients"].items():
            rows = ours["gradients"][name].double()
            rows = rows[: len(gradient)]  # without the vocabulary's padding
            difference = (rows - gradient).norm() / gradient.norm()
            assert difference <= 1e-5, f"{name} differs by {difference:.1e} of its norm, {objective}"


def write_weighted_pairs(path: Path, count: int) -> None:
    """The pairs of :func:`write_pairs`, all but the second with a weight, the first with 0."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            weight = {} if i == 1 else {"pair_weight": 0.75 * i}
            file.write(json.dumps(tiny_pair(i, f"{path.stem}-{i}") | weight) + "\n")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    overrides = prepare(folder, functools.partial(tiny_llama, layers=4, seed=7), write_weighted_pairs)
    return overrides, expected_steps(folder, overrides, ALL_OBJECTIVES)


def write_pairs_of_several_turns(path: Path, count: int) -> None:
    """Answers of one, two and three assistant turns, with a user's turns between them."""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            start = [{"role": "user", "content": f"Question {i}?"}]
            more = [
                {"role": "assistant", "content": "So?" * (i % 2 + 1)},
                {"role": "user", "content": f"The {i}th."},
            ]
            last = [{"role": "assistant", "content": "Yes." * (i % 3 + 1)}]
            no = [{"role": "assistant", "content": "No." * (i % 2 + 1)}]
            chosen = start + more * (i % 3) + last
            rejected = start + (no + [{"role": "user", "content": "Well?"}] if i % 2 else []) + no
            file.write(json.dumps({"id": f"several-{i}", "chosen": chosen, "rejected": rejected}) + "\n")


@pytest.fixture(scope="module")
def several_turns(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several_turns")
    overrides = prepare(folder, functools.partial(tiny_llama, layers=4, seed=7), write_pairs_of_several_turns)
    return overrides, expected_steps(folder, overrides)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    # seed 1: this model's router has no near-ties, so rounding never sends a token to another expert
    overrides = prepare(folder, functools.partial(tiny_family, family="Mixtral", tied=False, seed=1))
    return overrides, expected_steps(folder, overrides), folder


def run_layout(
    tmp_path: Path, overrides: list[str], size: int, layout: list[str], objectives: list[dict] = OBJECTIVES
) -> list[dict]:
    return run_ranks(
        size,
        steps_on_this_rank,
        RECIPE,
        [*overrides, f"train.output={tmp_path}/out", *layout],
        objectives,
        log=tmp_path / "log",
    )[0]


@pytest.fixture(params=["fast", "reference"])
def kernels(request, monkeypatch) -> str:
    """Each set of CPU kernels."""
    monkeypatch.setenv("TREG_CPU_KERNELS", request.param)  # the ranks inherit it
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_model(layout, kernels, dense, tmp_path):
    overrides, expected = dense
    objectives = OBJECTIVES[:3] if kernels == "reference" else OBJECTIVES
    if kernels == "fast" and layout in EVERY_OBJECTIVE:
        objectives = ALL_OBJECTIVES
    found = run_layout(tmp_path, overrides, *LAYOUTS[layout], objectives)
    assert_equal_steps(found, expected[: len(objectives)])


def labelled_steps(*args) -> list[dict] | None:
    device_labels.install()  # by its device, the optimizer tells the host's part from the GPU's
    return steps_on_this_rank(*args)


def test_optimizer_on_the_host(dense, tmp_path):
    overrides, expected = dense
    overrides = [*overrides, f"train.output={tmp_path}/out", "optimizer.offload=0.5"]
    found = run_ranks(2, labelled_steps, RECIPE, overrides, OBJECTIVES, log=tmp_path / "log")[0]
    assert_equal_steps(found, expected[: len(OBJECTIVES)])


@pytest.mark.parametrize("layout", SEVERAL_TURNS)
def test_answers_of_several_turns(layout, several_turns, tmp_path):
    overrides, expected = several_turns
    assert_equal_steps(run_layout(tmp_path, overrides, *LAYOUTS[layout]), expected)


@pytest.mark.parametrize("layout", EXPERTS)
def test_mixture_of_experts(layout, kernels, experts, tmp_path):
    overrides, expected, _ = experts
    assert_equal_steps(run_layout(tmp_path, overrides, *EXPERTS[layout]), expected)


@pytest.mark.parametrize("layout", EXPERTS)
def test_load_balancing_of_experts(layout, experts, tmp_path):
    overrides, _, folder = experts
    size, changes = EXPERTS[layout]
    found = run_ranks(
        size,
        steps_on_this_rank,
        RECIPE,
        [
            *overrides,
            f"train.output={tmp_path}/out",
            "data.pad_to_multiple_of=1",
            "optimizer.router_aux_loss=0.1",
            *changes,
        ],
        OBJECTIVES[:1],
        log=tmp_path / "log",
    )[0]
    expected = expected_step_with_balancing(folder, overrides, 0.1)
    assert_equal_steps(found, [expected])
    plain = experts[1][0]["gradients"]["module.decoder.layers.mlp.router.weight"]
    assert (expected["gradients"]["module.decoder.layers.mlp.router.weight"] - plain).norm() > 0.01 * plain.norm()
