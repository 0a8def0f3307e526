"""Preflight's arithmetic: micro-batches in flight and FLOPs, by hand and against published counts."""

import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest

from treg_megatron.config.recipe import load_recipe, section
from treg_megatron.errors import UserError
from treg_megatron.models.families import model_fields
from treg_megatron.preflight import costs, labelling
from treg_megatron.preflight.schedule import BACKWARD, FORWARD, events
from treg_megatron.utils.files import read_json

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ARCHITECTURES = Path(__file__).resolve().parents[2] / "treg_megatron" / "models" / "architectures"


def fields_of(name: str) -> dict:
    return model_fields(read_json(ARCHITECTURES / f"{name}.json"))


def in_flight(stage: int, stages: int, chunks: int, micro_batches: int) -> int:
    """Largest number of micro-batches, over all chunks, that wait for their backward pass."""
    alive = most = 0
    for event in events(stage, stages, chunks, micro_batches):
        alive += 1 if event.kind == FORWARD else -1
        most = max(most, alive)
    return most


@pytest.mark.parametrize(
    "stages, chunks, micro_batches", [(1, 1, 5), (4, 1, 16), (4, 1, 2), (4, 2, 8), (2, 3, 4), (18, 7, 72)]
)
def test_every_micro_batch_goes_forward_and_back_through_every_chunk(stages, chunks, micro_batches):
    for stage in range(stages):
        run = events(stage, stages, chunks, micro_batches)
        assert Counter(run) == {(kind, chunk): micro_batches for kind in (FORWARD, BACKWARD) for chunk in range(chunks)}
        alive = Counter()
        for kind, chunk in run:
            alive[chunk] += 1 if kind == FORWARD else -1
            assert alive[chunk] >= 0, "nothing goes back before it went forward"


def test_1f1b_holds_one_micro_batch_per_remaining_stage():
    assert [in_flight(stage, 4, 1, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(0, 4, 1, 2) == 2
    assert in_flight(0, 1, 1, 16) == 1


def test_interleaving_holds_more_of_smaller_chunks():
    """(stages - 1) x 2 + (chunks - 1) x stages in the warm-up, plus the running one (arXiv 2104.04473, figure 4)."""
    assert in_flight(0, 4, 2, 8) == 3 * 2 + 1 * 4 + 1
    assert in_flight(3, 4, 2, 8) == 0 * 2 + 1 * 4 + 1


def test_forward_flops_are_two_for_each_weight_and_token_and_attention_by_hand():
    fields = fields_of("llama3_8b")
    work = costs.forward_flops(fields, tokens=1000, responses=100)
    norms, embedding = 65 * 4096, 128256 * 4096
    assert work.layers == 2 * 1000 * (8_030_261_248 - 2 * embedding - norms)
    assert work.head == 2 * 100 * embedding
    assert work.attention == 4 * 32 * 128 * 32 * 1000**2 / 2


def test_an_expert_computes_only_the_tokens_routed_to_it():
    dense = fields_of("mixtral_8x7b")
    one = dense | {"moe_router_topk": 1}
    expert = 3 * 4096 * 14336 * 32
    assert costs.forward_flops(dense, 10, 0).layers - costs.forward_flops(one, 10, 0).layers == 2 * 10 * expert


def test_a_window_bounds_what_a_query_sees():
    fields = fields_of("gemma2_9b")
    short, long = (costs.forward_flops(fields, tokens, 0).attention for tokens in (4096, 8192))
    assert long < 4 * short
    assert (
        costs.forward_flops(fields | {"window_size": None, "window_attn_skip_freq": None}, 8192, 0).attention
        == 4 * 16 * 256 * 42 * 8192**2 / 2
    )


def test_a_checkpoint_holds_weights_and_three_fp32_values_of_what_trains():
    cluster = section(load_recipe(ARCHITECTURES.parents[2] / "recipes" / "llama3_8b.yaml"), "cluster")
    full = costs.checkpoint(8_030_261_248, 0, "bf16", cluster)
    assert full.nbytes == 8_030_261_248 * 14
    assert full.seconds == pytest.approx(full.nbytes / 10e9)
    assert costs.checkpoint(10, 1000, "bf16", cluster).nbytes == 1010 * 2 + 10 * 12


def test_the_architecture_on_disk_is_used_and_must_match_the_named_one(tmp_path):
    import json

    from treg_megatron.models.architecture import hf_config_of

    published = read_json(ARCHITECTURES / "llama3_8b.json")
    recipe = load_recipe(ARCHITECTURES.parents[2] / "recipes" / "llama3_8b.yaml", [f"model.hf={tmp_path}"])
    model = section(recipe, "model")
    assert hf_config_of(model) == published
    same = published | {"rms_norm_eps": 9.99999974e-06, "initializer_range": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(same))
    assert hf_config_of(model)["initializer_range"] == 0.1
    (tmp_path / "config.json").write_text(json.dumps(published | {"num_hidden_layers": 16}))
    with pytest.raises(UserError, match="is not llama3_8b: num_layers is 16, published 32"):
        hf_config_of(model)


def test_the_host_memory_of_saving_is_that_of_the_first_data_ranks():
    parallel = section(load_recipe("recipes/llama3_70b.yaml", []), "parallel")

    def gigabytes(elements: list[tuple[int, int]], per_node: int = 8, ranks: int = 16, **keys: int) -> float:
        sizes = dataclasses.replace(parallel, **{"tensor": 1, "pipeline": 1, "expert": 1, "context": 1} | keys)
        return costs.saving_host_bytes(elements, sizes, ranks, per_node) / 20e9

    assert gigabytes([(10**9, 0)]) == 1  # one of 16 data ranks gathers
    assert gigabytes([(10**9, 0)], tensor=4) == 4
    assert gigabytes([(10**9, 0)] * 2, pipeline=2) == 1  # the first ranks of the stages are on different nodes
    assert gigabytes([(10**9, 0)] * 2, ranks=8, pipeline=2) == 2
    assert gigabytes([(10**9, 3 * 10**9)], tensor=2, expert=4) == 2 * 1 + 8 * 3


@pytest.mark.parametrize(
    "model, parameters, gpus, memory, keys, said",
    [
        ("llama3_8b", 8.03e9, 4, 40, [], r"the whole model in each process, about 17.0 of 40 GB per rank$"),
        (
            "llama3_70b",
            70.6e9,
            4,
            40,
            [],
            "TOO MUCH: label.engine=megatron label.tensor=4 label.pipeline=1, within a node$",
        ),
        ("llama3_70b", 70.6e9, 4, 24, [], "TOO MUCH: .* label.tensor=4 label.pipeline=2, over 2 nodes$"),
        (
            "llama3_70b",
            70.6e9,
            4,
            40,
            ["engine=megatron", "tensor=4"],
            r"^megatron, tensor 4 .* about 3[\d.]* of 40 GB per rank$",
        ),
        (
            "llama3_70b",
            70.6e9,
            4,
            40,
            ["engine=megatron", "tensor=8"],
            "label.tensor=8 crosses nodes of 4 ranks: .*tensor=4 ",
        ),
        ("llama3_70b", 70.6e9, 4, 0.1, [], "no split over tensor and pipeline fits GPUs of 0.1 GB$"),
    ],
)
def test_whether_labelling_fits_a_node(model, parameters, gpus, memory, keys, said):
    overrides = [f"cluster.gpus_per_node={gpus}", f"cluster.gpu_memory={memory}", "label.pairs=p", "model.hf=m"]
    recipe = load_recipe(RECIPES / "tiny.yaml", [*overrides, "label.dtype=bfloat16", *(f"label.{key}" for key in keys)])
    label, cluster = section(recipe, "label"), section(recipe, "cluster")
    found = labelling.fit(int(parameters), label, fields_of(model), cluster)
    assert re.search(said, found) and "\n" not in found, found


@pytest.mark.slow
@pytest.mark.parametrize("memory, said", [(None, "$"), (100, " of 100$"), (50, " of 50 - TOO MUCH: raise ")])
def test_saving_is_compared_with_the_hosts_memory(memory, said):
    from treg_megatron.preflight import report  # imports NeMo

    assert re.match(said, report._of_host(80_000_000_000, memory))


@pytest.mark.slow
def test_the_search_leaves_out_schedules_that_the_model_cannot_have():
    from treg_megatron.preflight.plan import sections_of
    from treg_megatron.preflight.search import layouts

    chunks = {}
    for name in ("gemma2_27b", "qwen2.5_32b"):
        sections = sections_of(load_recipe(Path("recipes", f"{name}.yaml"), ["cluster.nodes=4"]))
        chunks[name] = {layout.sections.parallel.virtual_pipeline for layout in layouts(sections)}
    assert chunks["gemma2_27b"] == {None} and len(chunks["qwen2.5_32b"]) > 1
