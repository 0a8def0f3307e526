"""NeMo's Megatron strategy, with what it lacks where the optimizer is PyTorch's own Adam."""

from typing import Any

import lightning.pytorch as pl
import torch
from megatron.core import optimizer as optimizers
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from nemo import lightning as nl
from nemo.lightning.pytorch.strategies.utils import init_model_parallel

from treg_megatron.distributed.cpu_redirect import is_cpu
from treg_megatron.utils.substitute import substituted


class PolicyStrategy(nl.MegatronStrategy):
    """Checkpoints that reshard to any layout, also without Transformer Engine's or Apex' fused Adam."""

    def __init__(self, **kwargs):
        # fully reshardable: survives a change of tensor, pipeline and data parallelism; and the default format cannot
        # hold torch Adam's 0-dim step
        super().__init__(ckpt_optim_fully_reshardable=True, **kwargs)
        # Megatron's timers all-gather over the world, but NeMo's printer asks for them on rank 0 alone: a deadlock
        self.timers = None

    def setup_distributed(self) -> None:
        joined = torch.distributed.is_initialized()
        super().setup_distributed()
        if joined:  # NeMo ends early then: this is the rest of its method
            init_model_parallel(self.model)
            if self.data_sampler:
                self.data_sampler.setup(self.cluster_environment.global_rank())

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        # Megatron names the class outright; with a fused Adam its own is right
        own = TorchAdamDistributedOptimizer if issubclass(optimizers.Adam, torch.optim.Adam) else DistributedOptimizer
        with substituted(optimizers, "DistributedOptimizer", own):
            super().setup_optimizers(trainer)


class TorchAdamDistributedOptimizer(DistributedOptimizer):
    """Megatron's distributed optimizer around ``torch.optim.AdamW``, able to resume.

    Megatron 0.15 is written for fused Adams, which count steps in the parameter group. torch's keeps a 0-dim ``step``
    for each parameter: absent before the first step, when Megatron reads it to describe what it wants loaded; missing
    from the loaded tensors; and one shared object after loading, so that each parameter would advance it for all.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.fuse_on_cpu()

    def sharded_state_dict(self, model_sharded_state_dict: dict, is_loading: bool = False, *args, **kwargs) -> dict:
        if is_loading:
            self._materialise_state()
        return super().sharded_state_dict(model_sharded_state_dict, is_loading, *args, **kwargs)

    def fuse_on_cpu(self) -> None:
        """One pass over memory a step instead of a dozen; torch chooses a kernel by itself on a GPU only."""
        for group in self.optimizer.param_groups:
            group["fused"] = is_cpu() or None

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
