"""NeMo's Megatron strategy, extended to resume with PyTorch's own Adam."""

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import optimizer as optimizers
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from nemo import lightning as nl
from nemo.lightning.io.pl import ckpt_to_weights_subdir
from nemo.lightning.pytorch.strategies.utils import init_model_parallel

from treg_megatron.checkpoint.policy import without_missing_extra_states
from treg_megatron.distributed.cpu_redirect import uses_cpu_kernels
from treg_megatron.distributed.megatron_versions import arguments_that_nemo_passes, complete_nemos_background_saves
from treg_megatron.training.offload import SETTINGS, offloaded_adam, state_stays_on_its_device
from treg_megatron.utils.substitute import substituted


class PolicyStrategy(nl.MegatronStrategy):
    """NeMo's strategy with checkpoints that reshard to any layout, even without a fused Adam from TE or Apex."""

    def __init__(self, **kwargs):
        complete_nemos_background_saves()
        # fully reshardable: can be loaded under any tensor, pipeline and data parallelism. The default format also
        # cannot store torch Adam's 0-dim step.
        # Memory-efficient: the first data-parallel rank alone gathers the optimizer's state, over gloo; otherwise every
        # rank gathers all of it, through the memory of its GPU.
        super().__init__(
            ckpt_optim_fully_reshardable=True, distrib_optim_fully_reshardable_mem_efficient=True, **kwargs
        )
        # Megatron's timers all-gather over all ranks, but NeMo's printer reads them on rank 0 alone, which deadlocks
        self.timers = None

    def load_checkpoint(self, checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        """NeMo's method, for checkpoints written with or without Transformer Engine, wherever they are loaded."""
        model, weights = self.megatron_parallel, ckpt_to_weights_subdir(checkpoint_path, is_saving=False)
        wanted = model.sharded_state_dict

        def saved(*args, **kwargs) -> dict[str, Any]:
            return without_missing_extra_states(wanted(*args, **kwargs), weights)

        with substituted(model, "sharded_state_dict", saved):
            return super().load_checkpoint(checkpoint_path, selective_restore)

    def setup_distributed(self) -> None:
        joined = torch.distributed.is_initialized()
        super().setup_distributed()
        if joined:  # NeMo returns early in this case: do the rest of its method
            init_model_parallel(self.model)
            if self.data_sampler:
                self.data_sampler.setup(self.cluster_environment.global_rank())

    @property
    def offloads(self) -> bool:
        """Whether a part of the parameters is updated on the host."""
        return self.lightning_module.optim.config.optimizer_cpu_offload

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        # Megatron hard-codes the class
        fused = not issubclass(optimizers.Adam, torch.optim.Adam)
        own = ReshardableOptimizer if fused else TorchAdamDistributedOptimizer
        if self.offloads:
            own = OffloadingDistributedOptimizer
        with (
            substituted(optimizers, "DistributedOptimizer", own),
            offloaded_adam() if self.offloads else contextlib.nullcontext(),
            arguments_that_nemo_passes(),
        ):
            super().setup_optimizers(trainer)

    def load_optimizer_state_dict(self, *args, **kwargs) -> None:
        with state_stays_on_its_device() if self.offloads else contextlib.nullcontext():
            super().load_optimizer_state_dict(*args, **kwargs)


class ReshardableOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer, whose fully reshardable state is right also with several buckets.

    Megatron gathers the state of all buckets without the padding between them, and then cuts each parameter out at its
    place in the buffer, where the padding counts: every parameter behind a padded bucket would be saved shifted.
    """

    def sharded_param_state_fully_reshardable(self, *args, **kwargs) -> dict | None:
        with contextlib.ExitStack() as places:
            for buffer in self.buffers:
                places.enter_context(substituted(buffer, "param_index_map", places_without_padding(buffer)))
            return super().sharded_param_state_fully_reshardable(*args, **kwargs)


def places_without_padding(buffer: Any) -> dict[torch.nn.Parameter, tuple[int, int, int]]:
    """A buffer's ``param_index_map``, (first element, end, bucket) of each parameter, as if no bucket were padded."""
    before, unpadded = [], 0
    for bucket in buffer.buckets:
        before.append(bucket.offset - unpadded)
        unpadded += bucket.numel_unpadded
    return {
        parameter: (start - before[bucket], end - before[bucket], bucket)
        for parameter, (start, end, bucket) in buffer.param_index_map.items()
    }


class TorchAdamDistributedOptimizer(ReshardableOptimizer):
    """Megatron's distributed optimizer around ``torch.optim.AdamW``, able to resume.

    Megatron assumes a fused Adam, which counts steps in the parameter group. torch's Adam keeps a 0-dim ``step``
    per parameter. It does not exist before the first step, when Megatron reads it to describe what to load. It is
    missing from the loaded tensors. After loading it is one shared object, which every parameter would increment.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fuse_on_cpu()

    def sharded_state_dict(self, model_sharded_state_dict: dict, is_loading: bool = False, *args, **kwargs) -> dict:
        if is_loading:
            self._materialise_state()
        return super().sharded_state_dict(model_sharded_state_dict, is_loading, *args, **kwargs)

    def fuse_on_cpu(self) -> None:
        """Use torch's fused kernel (one pass over memory per step instead of a dozen), by default used only on GPUs."""
        for group in self.optimizer.param_groups:
            group["fused"] = uses_cpu_kernels() or None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.fuse_on_cpu()  # the groups are those of the machine that saved them
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def _set_main_param_and_optimizer_states(self, model_param: torch.nn.Parameter, tensors: dict) -> None:
        group, order = self.model_param_group_index_map[model_param]
        step = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]["step"]
        super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": step.clone()})

    def _materialise_state(self) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


class OffloadingDistributedOptimizer(ReshardableOptimizer):
    """Megatron's distributed optimizer around :class:`~treg_megatron.training.offload.OffloadedAdam`."""

    @classmethod
    def _build_model_and_main_param_groups(cls, gbuf_ranges, param_gbuf_map, opt_group_ranges, config) -> tuple:
        """Megatron's, with shards of fp32 parameters that are leaves, as those of others are: torch takes no other."""
        groups = super()._build_model_and_main_param_groups(gbuf_ranges, param_gbuf_map, opt_group_ranges, config)
        _, _, _, shard_fp32_groups, _ = groups
        for group, shards in zip(opt_group_ranges, shard_fp32_groups, strict=True):
            for i, shard in enumerate(shards):
                shards[i] = shard.detach()
                vars(shards[i]).update(vars(shard))
            group["orig_group"]["params"][: len(shards)] = shards
        return groups

    def state_dict(self) -> dict:
        """What any run can load, with or without offload."""
        state = super().state_dict()
        for group in state["optimizer"]["param_groups"]:
            for name in SETTINGS:
                group.pop(name, None)
        return state

    def sharded_state_dict(self, model_sharded_state_dict: dict, is_loading: bool = False, *args, **kwargs) -> dict:
        if is_loading:
            self.optimizer.allocate()
        return super().sharded_state_dict(model_sharded_state_dict, is_loading, *args, **kwargs)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.optimizer.after_loading()
