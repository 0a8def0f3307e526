"""NeMo's Megatron strategy, with what it lacks where the optimizer is PyTorch's own Adam."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from nemo import lightning as nl


class PolicyStrategy(nl.MegatronStrategy):
    """Checkpoints that reshard to any layout, also without Transformer Engine's or Apex' fused Adam."""

    def __init__(self, **kwargs):
        # fully reshardable: survives a change of tensor, pipeline and data parallelism; and the default format cannot
        # hold torch Adam's 0-dim step
        super().__init__(ckpt_optim_fully_reshardable=True, **kwargs)
        # Megatron's timers all-gather over the world, but NeMo's printer asks for them on rank 0 alone: a deadlock
        self.timers = None

    def load_checkpoint(self, checkpoint_path: str | Path, selective_restore: bool = False) -> dict[str, Any]:
        for optimizer in self.optimizers:
            for part in _parts(optimizer.mcore_optimizer):
                _materialise_adam_state(part.optimizer)
        return super().load_checkpoint(checkpoint_path, selective_restore=selective_restore)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _materialise_adam_state(optimizer: torch.optim.Optimizer) -> None:
    """Give torch's Adam the state that its first step would create.

    Megatron's distributed optimizer reads ``step`` from the state to describe what it wants loaded, and torch's Adam
    has no state before its first step; fused Adams are not asked.
    """
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.numel() and not optimizer.state[parameter]:
                optimizer.state[parameter] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
