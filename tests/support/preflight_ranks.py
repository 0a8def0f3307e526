"""Memory that preflight predicts for a model, and memory measured on real ranks under Megatron's schedule."""

from typing import NamedTuple

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
    """Run two real steps; return the peak of the second, when all persistent state exists."""
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
    """Prediction for each rank, from meta tensors in a fake world."""
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
