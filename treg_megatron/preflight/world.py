"""Fake process group of any size in a single process: Megatron's real groups with collectives that do nothing."""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from treg_megatron.config.schema import ParallelSection
from treg_megatron.preflight.meta import on_meta


@contextlib.contextmanager
def fake_world(parallel: ParallelSection, size: int, rank: int, gpu: bool) -> Iterator[None]:
    """Make this process ``rank`` of ``size``, with CUDA allocations redirected to the meta device.

    Fake groups cost nothing, so a world of thousands of ranks takes milliseconds.

    Args:
        parallel: the layout for which Megatron's process groups are made.
        gpu: whether the real ranks are GPUs, see :class:`~treg_megatron.preflight.meta.OnMeta`.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        parallel_state.initialize_model_parallel(
            parallel.tensor,
            parallel.pipeline,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            create_gloo_process_groups=False,
        )
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            model_parallel_cuda_manual_seed(1)
            with on_meta(gpu):
                yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def rank_of_stage(parallel: ParallelSection, size: int, stage: int) -> int:
    """First global rank of a pipeline stage: pipeline is the slowest dimension in Megatron's rank order."""
    return stage * (size // parallel.pipeline)


def group_names(experts: bool) -> dict[str, str]:
    """Kind of each of this rank's process groups, keyed by torch's group name; groups of one rank are left out."""
    groups = {
        "context": parallel_state.get_context_parallel_group(),
        "tensor": parallel_state.get_tensor_model_parallel_group(),
    }
    if experts:
        groups |= {
            "expert": parallel_state.get_expert_model_parallel_group(),
            "expert tensor": parallel_state.get_expert_tensor_parallel_group(),
            "expert tensor x expert": parallel_state.get_expert_tensor_and_model_parallel_group(),
        }
    return {group.group_name: name for name, group in groups.items() if group.size() > 1}
