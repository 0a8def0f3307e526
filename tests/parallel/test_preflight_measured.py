"""What preflight predicts against what real ranks take: Megatron's own schedule over gloo, live tensors counted."""

from typing import NamedTuple

import pytest

from tests.support.forked import run_ranks
from treg_megatron.config.recipe import load_recipe

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
}
MODELS = {
    "tiny": LLAMA
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 384,
        "tie_word_embeddings": True,
    },
    "56M": LLAMA
    | {
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
    "SmolLM2-135M": LLAMA
    | {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
}
LAYOUTS = {
    "TP1": (1, []),
    "TP2": (2, ["parallel.tensor=2"]),
    "TP2+SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2": (2, ["parallel.pipeline=2"]),
    "DP2": (2, []),
    "TP2xPP2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "TP3": (3, ["parallel.tensor=3"]),  # SmolLM2 has 9 heads
    "TP3xPP2": (6, ["parallel.tensor=3", "parallel.pipeline=2"]),
}
#: (tokens, response tokens) of chosen and rejected
SEQUENCES = [(120, 70), (136, 90)]
MICRO_BATCHES = 4


class Bytes(NamedTuple):
    weights: int
    gradients: int
    main_parameters: int
    optimizer_state: int
    peak: int


def sections_for(layout: str, precision: str, recompute: str):
    from treg_megatron.preflight.plan import sections_of

    ranks, overrides = LAYOUTS[layout]
    return sections_of(
        load_recipe(
            "recipes/tiny.yaml",
            [
                "model.hf=unused",
                "label.pairs=unused",
                f"train.precision={precision}",
                f"train.recompute={recompute}",
                f"cluster.gpus_per_node={ranks}",
                *overrides,
            ],
        )
    )


def built(hf_config, sections):
    from treg_megatron.preflight.ranks import build_rank

    return build_rank(
        hf_config, sections.parallel, sections.train, sections.objective, sections.optimizer, sections.lora, fused=False
    )


def measure_on_this_rank(hf_config, layout, precision, recompute) -> Bytes:
    """Two real steps; the second one's peak, when everything is there that stays."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from treg_megatron.data.collate import collate
    from treg_megatron.models import policy as policies
    from treg_megatron.preflight.activations import pair_of
    from treg_megatron.preflight.live import LiveTensors
    from treg_megatron.preflight.ranks import bytes_at_rest

    sections = sections_for(layout, precision, recompute)
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(sections.parallel.tensor, sections.parallel.pipeline)
    model_parallel_cuda_manual_seed(1)
    rank = built(hf_config, sections)
    policy, config = rank.policies[0], rank.config
    batch = collate([pair_of(*SEQUENCES)], sections.data.layout, sections.data.pad_to_multiple_of)

    def forward(batches, module):
        output = policies.forward_step(policy, policies.data_step(batches))
        return output, lambda logps, **_: policy.training_loss_reduction.forward(batch, logps)

    for _ in range(2):
        for chunk in rank.wrapped:
            chunk.zero_grad_buffer()
        live = LiveTensors(rank.tensors_at_rest())
        with live:
            get_forward_backward_func()(
                forward_step_func=forward,
                data_iterator=iter([batch] * MICRO_BATCHES),
                model=rank.wrapped,
                num_microbatches=MICRO_BATCHES,
                seq_length=batch["tokens"].shape[1],
                micro_batch_size=1,
                forward_only=False,
            )
            live.end_phase("step")
        for chunk in rank.wrapped:
            chunk.finish_grad_sync()
        rank.optimizer.step()
    assert config.params_dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return Bytes(*bytes_at_rest(rank.wrapped, rank.optimizer), live.peaks["step"])


def predict_in_this_process(hf_config, layout, precision, recompute) -> list[Bytes]:
    """For each rank, from meta tensors in a fake world."""
    from treg_megatron.preflight import activations, schedule
    from treg_megatron.preflight.ranks import bytes_at_rest
    from treg_megatron.preflight.world import fake_world

    sections = sections_for(layout, precision, recompute)
    stages, size, predicted = sections.parallel.pipeline, LAYOUTS[layout][0], []
    for number in range(size):
        stage = number // (size // stages)
        with fake_world(sections.parallel, size, number, gpu=False):
            rank = built(hf_config, sections)
            batch = activations.micro_batch(sections.data, sections.parallel, SEQUENCES)
            run = activations.run_chunk(rank, 0, batch)
            peak = activations.peak(
                [run],
                schedule.events(stage, stages, 1, MICRO_BATCHES),
                held=activations.hidden_bytes(batch, rank.config) if stage else 0,
            )
            predicted.append(Bytes(*bytes_at_rest(rank.wrapped, rank.optimizer), peak.total))
    return predicted


CASES = [
    ("tiny", layout, "fp32", recompute) for layout in LAYOUTS for recompute in ("none", "full") if "3" not in layout
]
CASES += [
    ("56M", "TP1", "fp32", "none"),
    ("56M", "TP2xPP2", "fp32", "full"),
    ("tiny", "PP2", "bf16", "none"),
    ("tiny", "TP2+SP", "bf16", "selective"),
    ("tiny", "TP1", "fp32", "selective"),
]


@pytest.mark.parametrize("model, layout, precision, recompute", CASES, ids=lambda value: value)
def test_what_is_predicted_is_what_real_ranks_take(model, layout, precision, recompute):
    case = (MODELS[model], layout, precision, recompute)
    measured = run_ranks(LAYOUTS[layout][0], measure_on_this_rank, *case)
    predicted = run_ranks(1, predict_in_this_process, *case)[0]
    for real, found in zip(measured, predicted, strict=True):
        assert real[:4] == found[:4], "weights, gradients, main parameters and optimizer state are exact"
        assert real.peak == pytest.approx(found.peak, rel=0.1)


def main() -> None:
    """Print the table of docs/PREFLIGHT.md: every model, layout and recompute."""
    from tests.support.forked import warm_up

    warm_up()
    for model, config in MODELS.items():
        tensor = "TP3" if config["num_attention_heads"] % 2 else "TP2"
        for layout in ("TP1", tensor, "PP2", f"{tensor}xPP2"):
            for recompute in ("none", "selective", "full"):
                case = (config, layout, "fp32", recompute)
                measured = run_ranks(LAYOUTS[layout][0], measure_on_this_rank, *case)
                predicted = run_ranks(1, predict_in_this_process, *case)[0]
                for rank, (real, found) in enumerate(zip(measured, predicted, strict=True)):
                    print(
                        f"| {model} | {layout} | {recompute} | {rank} | {'yes' if real[:4] == found[:4] else 'NO'} | "
                        f"{found.peak / 1e6:.2f} | {real.peak / 1e6:.2f} | {found.peak / real.peak - 1:+.1%} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
