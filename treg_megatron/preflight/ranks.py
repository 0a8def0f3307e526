"""Model, data-parallel wrapper and optimizer of one rank, on meta tensors in a fake world, and their memory."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import ChainedOptimizer, get_megatron_optimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from nemo.collections.llm.fn.mixin import FNMixin
from nemo.lightning.megatron_parallel import DDP

from treg_megatron.config.schema import LoraSection, ObjectiveSection, OptimizerSection, ParallelSection, TrainSection
from treg_megatron.kernels.core_attention import SdpaAttention
from treg_megatron.kernels.kernels import Kernels, cpu_kernels
from treg_megatron.models.build import build_policy, policy_config
from treg_megatron.models.lora import adapters
from treg_megatron.objective import Objective
from treg_megatron.training import build


class AtRest(NamedTuple):
    """Memory that a rank holds between steps, in bytes."""

    weights: int
    gradients: int
    main_parameters: int  # under bf16: this rank's shard of the fp32 copies
    optimizer_state: int

    def offloaded(self, fraction: float) -> "AtRest":
        """With a fraction of the parameters updated on the host."""
        return self._replace(
            main_parameters=round((1 - fraction) * self.main_parameters),
            optimizer_state=round((1 - fraction) * self.optimizer_state),
        )


@dataclasses.dataclass(frozen=True)
class Rank:
    """The objects that training builds on a rank.

    Attributes:
        policies: its model chunks; more than one under the interleaved schedule.
        wrapped: the chunks' modules in Megatron's data-parallel wrapper.
        optimizer: the distributed optimizer over them.
    """

    policies: list[torch.nn.Module]
    wrapped: list[torch.nn.Module]
    optimizer: Any

    @property
    def config(self) -> TransformerConfig:
        """The model's configuration, the same for all chunks."""
        return self.policies[0].config

    def tensors_at_rest(self) -> list[torch.Tensor]:
        """All parameters, module buffers, gradient buffers and main parameters, which persist between steps."""
        return [
            *(t for policy in self.policies for t in (*policy.parameters(), *policy.buffers())),
            *(buffer.grad_data for buffer in _buffers(self.wrapped)),
            *main_parameters(self.optimizer),
        ]


def build_rank(
    hf_config: dict,
    parallel: ParallelSection,
    train: TrainSection,
    objective: ObjectiveSection,
    optimizer: OptimizerSection,
    lora: LoraSection,
    fused: bool,
) -> Rank:
    """Build this rank's part of the model as :mod:`treg_megatron.train` does; call it inside a (real or fake) process
    group.

    Args:
        fused: use the fused operations that only GPUs have.
    """
    # overlapped communication holds the same memory, and its hooks expect a whole step
    in_turns = dataclasses.replace(parallel, overlap_grad_reduce=False, overlap_param_gather=False)
    strategy = build.strategy(in_turns, train, initial_weights=None)
    on_meta = torch.distributed.get_backend() == "fake"
    config = policy_config(hf_config, parallel, train, kernels=planned_kernels(fused, on_meta))
    if fused:
        for name in ("bias_activation_fusion", "bias_dropout_fusion"):
            setattr(config, name, type(config).__dataclass_fields__[name].default)
        config.deallocate_pipeline_outputs = True
    if on_meta and config.num_moe_experts:
        # with a capacity factor of 1 routing is balanced, and the tokens per expert do not depend on data
        config.moe_pad_expert_input_to_capacity, config.moe_expert_capacity_factor = True, 1.0
    transform = adapters(lora, config)
    policies = []
    for vp_stage in [{"vp_stage": chunk} for chunk in range(parallel.virtual_pipeline or 0)] or [{}]:
        policy = build_policy(config, Objective.of(objective), build.optimizer(optimizer, train, steps=1))
        strategy.connect(policy)
        with torch.device("meta") if on_meta else torch.device("cpu"):
            policy.configure_model(**vp_stage)
            if transform is not None:
                transform(_Walkable(policy.module))
        policy.train()
        policies.append(policy)
    wrapped = [
        DDP(
            config,
            strategy.ddp_config,
            policy.module,
            disable_bucketing=chunk > 0,
            data_parallel_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        for chunk, policy in enumerate(policies)
    ]
    return Rank(
        policies, wrapped, get_megatron_optimizer(policies[0].optim.config, wrapped, use_gloo_process_groups=False)
    )


def planned_kernels(fused: bool, on_meta: bool) -> Kernels:
    """Kernels that take the same memory as the real ones.

    Args:
        fused: see :func:`build_rank`. Fused GPU kernels save the same tensors for the backward pass as the fast CPU
            set; only the activation is Megatron's own fused one.
        on_meta: use unpacked attention, because the packed CPU kernel would split the row by its values and allocate
            tensors of its own.
    """
    kernels = dataclasses.replace(Kernels.fast_cpu(), activation=None, linear=None) if fused else cpu_kernels()
    return dataclasses.replace(kernels, core_attention=SdpaAttention) if on_meta else kernels


class _Walkable(FNMixin, torch.nn.Module):
    """Wrapper with the interface that NeMo's model transforms need; NeMo's Lightning module would need a trainer."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module


def bytes_at_rest(wrapped: list[torch.nn.Module], optimizer: Any) -> AtRest:
    """Memory of the wrapped model and its optimizer, including the padding of Megatron's buffers.

    Adam has no state before the first step; in that case two fp32 moments per main parameter are counted.
    """
    parameters = [p for chunk in wrapped for p in chunk.parameters()]
    buffers = list(_buffers(wrapped))
    weights = storage_bytes(
        [
            *parameters,
            *(b.param_data for b in buffers if b.param_data is not None),
            *(t for chunk in wrapped for t in chunk.module.buffers()),
        ]
    )
    main = list(main_parameters(optimizer))
    state = [
        t
        for part in _parts(optimizer)
        for values in part.optimizer.state.values()
        for t in values.values()
        if isinstance(t, torch.Tensor) and t.dim()
    ]
    weight_storages = {id(p.untyped_storage()) for p in parameters}
    return AtRest(
        weights=weights,
        gradients=storage_bytes(b.grad_data for b in buffers),
        main_parameters=storage_bytes(p for p in main if id(p.untyped_storage()) not in weight_storages),
        optimizer_state=storage_bytes(state) if state else 2 * sum(p.numel() * 4 for p in main),
    )


def trained_elements(wrapped: list[torch.nn.Module]) -> tuple[int, int]:
    """Trained parameters of this rank without padding: those that all data-parallel ranks hold, and its experts'."""
    return (
        sum(buffer.numel_unpadded for chunk in wrapped for buffer in chunk.buffers),
        sum(buffer.numel_unpadded for chunk in wrapped for buffer in chunk.expert_parallel_buffers),
    )


def main_parameters(optimizer: Any) -> Iterable[torch.Tensor]:
    """The parameters of the inner optimizer: this rank's shard, in fp32."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            yield from group["params"]


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Total bytes of the tensors' storages, each storage counted once."""
    return sum({id(s): s.nbytes() for s in [t.untyped_storage() for t in tensors]}.values())


def parameters_of_the_model(policies: list[torch.nn.Module]) -> tuple[int, int]:
    """(Trainable, frozen) parameters of this pipeline stage, summed over its tensor- and expert-parallel ranks.

    Replicated parameters count once. Vocabulary padding and the last stage's copy of tied embeddings are not counted.
    """
    counts = [0, 0]
    for policy in policies:
        config = policy.config
        for name, parameter in policy.module.named_parameters():
            if getattr(parameter, "shared", False) and not policy.module.pre_process:
                continue
            split = config.tensor_model_parallel_size if getattr(parameter, "tensor_model_parallel", False) else 1
            expert = not getattr(parameter, "allreduce", True)
            count = parameter.numel() * split * (config.expert_model_parallel_size if expert else 1)
            if name.endswith(("word_embeddings.weight", "output_layer.weight")):
                count = count // config.vocab_size * config.true_vocab_size
            counts[not parameter.requires_grad] += count
    return counts[0], counts[1]


def _parts(optimizer: Any) -> list:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _buffers(wrapped: list[torch.nn.Module]) -> Iterable:
    for chunk in wrapped:
        yield from (*chunk.buffers, *chunk.expert_parallel_buffers)
