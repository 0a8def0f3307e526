"""Peak activation memory of a rank in a training step, from an actual forward and backward pass on meta tensors.

One micro-batch is run; the pipeline schedule determines how many of them are in flight at each moment.
"""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from megatron.core.transformer.transformer_config import TransformerConfig

from treg_megatron.config.schema import DataSection, ParallelSection
from treg_megatron.data.aligned import PairRecord
from treg_megatron.data.collate import collate, row_multiple
from treg_megatron.distributed.context_parallel import ContextPart
from treg_megatron.models import policy as policies
from treg_megatron.preflight.live import LiveTensors
from treg_megatron.preflight.ranks import Rank
from treg_megatron.preflight.schedule import FORWARD, Event

LAYERS, HEAD = "layers", "log-prob head"


class Pass(NamedTuple):
    """Memory of one micro-batch on one model chunk, in bytes."""

    kept: int  # saved between the forward and the backward pass
    forward: dict[str, int]  # peak of the forward pass by phase (LAYERS, HEAD)
    backward: dict[str, int]  # peak of the backward pass by phase, including what was kept
    moved: Counter[tuple[str, str]]  # passed to collectives, see LiveTensors


class Peak(NamedTuple):
    """Memory at the peak of a step, in bytes."""

    activations: int  # kept for pending backward passes
    working: int  # temporaries of the layer that runs
    head: int  # added by the log-prob head

    @property
    def total(self) -> int:
        """All bytes at the peak."""
        return sum(self)


def largest_micro_batch(data: DataSection, parallel: ParallelSection) -> dict:
    """The largest micro-batch that the recipe allows: full-length sequences, nearly all response tokens.

    Ignores ``data.share_prompts``, with which the two responses of a pair share the prompt's tokens: real micro-batches
    are then smaller, and the estimate is too high.
    """
    sequences, tokens = 2 * data.micro_batch_size, 2 * data.micro_batch_size * data.seq_length
    if data.layout == "bins":
        tokens = data.tokens_of_a_bin
        sequences = 2 * math.ceil(tokens / (2 * data.seq_length))
    length = tokens // sequences
    return micro_batch(data, parallel, [(length, length - 1)] * sequences)


def micro_batch(data: DataSection, parallel: ParallelSection, sequences: list[tuple[int, int]]) -> dict:
    """A collated micro-batch on meta tensors.

    Args:
        sequences: (tokens, response tokens) of chosen 0, rejected 0, chosen 1, ...
    """
    records = [pair_of(*shapes) for shapes in zip(sequences[0::2], sequences[1::2], strict=True)]
    batch = collate(
        records,
        "packed" if data.layout == "bins" else data.layout,
        row_multiple(data, parallel),
        ContextPart(0, parallel.context),
    )
    return {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def run_chunk(rank: Rank, chunk: int, batch: dict) -> Pass:
    """Run a micro-batch forward and backward through one model chunk of a rank; call it inside a process group, real or
    fake."""
    policy = rank.policies[chunk]
    model, config = policy.module, policy.config
    live = LiveTensors(rank.tensors_at_rest())
    started = (
        model.decoder.register_forward_hook(lambda module, inputs, hidden: _watch_head(live, hidden))
        if model.post_process
        else None
    )
    with live:
        received = (
            None
            if model.pre_process
            else torch.empty(
                _hidden_shape(batch, config), dtype=config.pipeline_dtype, device="meta", requires_grad=True
            )
        )
        model.set_input_tensor(received)
        output = policies.forward_step(policy, batch)
        if model.post_process:
            output, *_ = policy.training_loss_reduction.forward(batch, output)
            started.remove()
        live.end_phase(HEAD if model.post_process else LAYERS)
        shape, dtype = output.shape, output.dtype
        deallocate_output_tensor(output, config.deallocate_pipeline_outputs)
        kept, forward, live.peaks = live.now, live.peaks, {}
        run_backward = custom_backward if config.deallocate_pipeline_outputs else torch.autograd.backward
        run_backward(output, torch.empty(shape, dtype=dtype, device="meta"))
        live.end_phase(LAYERS)
    model.set_input_tensor(None)
    return Pass(kept, forward, live.peaks, live.moved)


def peak(passes: list[Pass], schedule: list[Event], held: int) -> Peak:
    """Peak memory of a step.

    Args:
        passes: memory of one micro-batch on each model chunk.
        schedule: order in which the chunks run.
        held: bytes of the gradient last sent to the previous stage, which the schedule keeps until it sends the next.
    """
    in_flight: Counter[int] = Counter()
    most = {LAYERS: 0, HEAD: 0}
    activations = 0
    for kind, chunk in schedule:
        run = passes[chunk]
        if kind != FORWARD:
            in_flight[chunk] -= 1
        others = held + sum(count * passes[c].kept for c, count in in_flight.items())
        for phase, nbytes in (run.forward if kind == FORWARD else run.backward).items():
            if others + nbytes > max(most.values()):
                activations = others - held + (0 if kind == FORWARD else run.kept)
            most[phase] = max(most[phase], others + nbytes)
        if kind == FORWARD:
            in_flight[chunk] += 1
    activations = min(activations, most[LAYERS])
    return Peak(activations, most[LAYERS] - activations, max(0, most[HEAD] - most[LAYERS]))


def hidden_bytes(batch: dict, config: TransformerConfig) -> int:
    """Bytes of the hidden states [s, b, h] that one stage sends to the next per micro-batch."""
    return math.prod(_hidden_shape(batch, config)) * config.params_dtype.itemsize


def _watch_head(live: LiveTensors, hidden: torch.Tensor) -> None:
    live.end_phase(LAYERS)
    hidden.register_hook(lambda gradient: live.end_phase(HEAD))


def _hidden_shape(batch: dict, config: TransformerConfig) -> tuple[int, int, int]:
    rows, width = batch["tokens"].shape
    return width // (config.tensor_model_parallel_size if config.sequence_parallel else 1), rows, config.hidden_size


def pair_of(chosen: tuple[int, int], rejected: tuple[int, int]) -> PairRecord:
    """A pair of zeros with the given (tokens, response tokens) of each side."""
    tokens = [np.zeros(length, dtype=np.int32) for length, _ in (chosen, rejected)]
    values = [np.zeros(responses, dtype=np.float32) for _, responses in (chosen, rejected)]
    return PairRecord("", *tokens, *values, *values)
