"""The project's policy model on forked CPU ranks, loaded from a checkpoint and run in any layout."""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist


class Layout(NamedTuple):
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.expert


LAYOUTS = {
    "TP1": Layout(),
    "TP2": Layout(tensor=2),
    "PP2": Layout(pipeline=2),
    "TP2xPP2": Layout(2, 2),
    "EP2": Layout(expert=2),
}


def load(checkpoint: Path, layout: Layout):
    """The policy on this rank, in a new world of ``layout.ranks``."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from treg_megatron.checkpoint.layout import read_metadata
    from treg_megatron.checkpoint.policy import load_policy
    from treg_megatron.models.families import model_fields

    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(layout.tensor, layout.pipeline, expert_model_parallel_size=layout.expert)
    model_parallel_cuda_manual_seed(1)
    experts = "num_moe_experts" in model_fields(read_metadata(checkpoint).hf_config)
    return load_policy(checkpoint, *layout, sequence=experts and layout.tensor > 1)


def token_logprobs(policy, tokens: torch.Tensor, packed: bool) -> torch.Tensor | None:
    """log p(token t+1 | tokens up to t), [batch, length - 1], on the ranks of the last pipeline stage, else None."""
    from megatron.core import parallel_state

    from treg_megatron.kernels.attention import Span
    from treg_megatron.models.policy import forward_step

    batch, length = tokens.shape
    positions = torch.arange(length).expand(batch, -1)
    if packed:
        rows = torch.arange(batch)[:, None] * length + torch.arange(length - 1)
        given = {
            "tokens": tokens.reshape(1, -1),
            "position_ids": positions.reshape(1, -1),
            "max_seqlen": length,
            "spans": [Span(length)] * batch,
            "cu_seqlens": torch.arange(0, batch * length + 1, length, dtype=torch.int32),
        }
    else:
        rows = torch.arange(length - 1) * batch + torch.arange(batch)[:, None]
        given = {"tokens": tokens, "position_ids": positions}
    given |= {"rows": rows.reshape(-1), "targets": tokens[:, 1:].reshape(-1)}
    model = policy.module
    splits = model.config.tensor_model_parallel_size if model.config.sequence_parallel else 1
    width = given["tokens"].shape[1] // splits
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            hidden = torch.empty(width, len(given["tokens"]), model.config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output = forward_step(policy, given)
        if not parallel_state.is_pipeline_last_stage():
            dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return None
        return output.view(batch, length - 1)
