"""Adam on the host for a part of the parameters: Megatron's hybrid optimizer, made to resume and to take fp32."""

import contextlib
from collections.abc import Iterator

import torch
from megatron.core import optimizer as optimizers
from megatron.core.optimizer import OptimizerConfig, distrib_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from nemo.lightning.pytorch.strategies import megatron_strategy

from treg_megatron.distributed.cpu_redirect import is_cpu
from treg_megatron.distributed.device_labels import is_labelled
from treg_megatron.errors import UserError
from treg_megatron.utils.substitute import substituted

#: what the hybrid optimizer adds to every parameter group: its own settings, classes among them
SETTINGS = (
    *("offload_fraction", "cpu_optimizer_cls", "gpu_optimizer_cls", "param_update_in_fp32"),
    *("pin_cpu_grads", "pin_cpu_params", "overlap_cpu_optimizer_d2h_h2d"),
)


def offload(config: OptimizerConfig, fraction: float) -> None:
    """Configure Megatron to keep and update ``fraction`` of the parameters on the host.

    Copies between device and host stay in the stream of the computation: in megatron-core 0.15, a forward pass does not
    wait for those of another.

    Raises:
        UserError: it is no fraction, or there is no GPU to offload.
    """
    require_fraction(fraction)
    if fraction and is_cpu() and not is_labelled():
        raise UserError("optimizer.offload moves state from a GPU to its host: set it to 0 for CPU ranks")
    if fraction:
        config.optimizer_cpu_offload, config.optimizer_offload_fraction = True, fraction
        # the hybrid optimizer holds the fp32 copies; set here, because the constructor would ask for the version of
        # Transformer Engine, which need not be installed
        config.use_precision_aware_optimizer = config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        config.store_param_remainders = False


def require_fraction(fraction: float) -> float:
    """``optimizer.offload``, checked.

    Raises:
        UserError: it is no fraction.
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"optimizer.offload={fraction:g} is the fraction of the parameters on the host: 0 to 1")
    return fraction


@contextlib.contextmanager
def offloaded_adam() -> Iterator[None]:
    """Inside the block, Megatron builds :class:`OffloadedAdam`, with torch's Adam on both devices."""
    with (
        substituted(optimizers, "HybridDeviceOptimizer", OffloadedAdam),
        substituted(distrib_optimizer, "HybridDeviceOptimizer", OffloadedAdam),
        substituted(optimizers, "CPUAdam", HostAdam),
        # Transformer Engine's counts steps in the group, where the hybrid optimizer would reset them after a resume
        substituted(optimizers, "Adam", torch.optim.AdamW),
    ):
        yield


@contextlib.contextmanager
def state_stays_on_its_device() -> Iterator[None]:
    """Inside the block, Lightning does not move the optimizer's state to the GPU."""
    with substituted(megatron_strategy, "_optimizer_to_device", lambda optimizer, device: None):
        yield


class HostAdam(torch.optim.AdamW):
    """Adam of the parameters on the host, which Megatron tells from the GPU's by its class."""


class OffloadedAdam(HybridDeviceOptimizer):
    """Megatron's hybrid optimizer, also of parameters in fp32.

    Megatron's takes over weights, restores main parameters and finds gradients only where it holds a second copy in
    fp32.
    """

    def update_fp32_param_by_new_param(self) -> None:
        """Take over the weights of the model."""
        for parameter, own in self._copies():
            own.data.copy_(parameter)

    def allocate(self) -> None:
        """Moments of 0 and no step where there are none: they are loaded into."""
        for optimizer in self.sub_optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if not optimizer.state[parameter]:
                        optimizer.state[parameter] = {
                            "step": torch.tensor(0.0),
                            "exp_avg": torch.zeros_like(parameter),
                            "exp_avg_sq": torch.zeros_like(parameter),
                        }
        self._sync_sub_optimizers_state_to_hdo()

    def after_loading(self) -> None:
        """A step for each parameter, which Megatron loads as one object, and the kernels of this machine."""
        for state in self.state.values():
            state["step"] = state["step"].clone()
        for group in self.param_groups:
            group["fused"] = True

    def _set_sub_optimizer_grads(self) -> None:
        super()._set_sub_optimizer_grads()
        for parameter, own in self.param_to_inner_param.items():
            if own is parameter:
                parameter.grad = getattr(parameter, "decoupled_grad", parameter.grad)

    def _update_fp32_params_by_new_state(self) -> None:
        for parameter, own in self._copies():
            own.data.copy_(self.state[parameter]["master_param"])

    def _copies(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Shards of the model's parameters, and what is updated in their place: a copy on the host, in fp32 or both."""
        return [(parameter, own) for parameter, own in self.param_to_inner_param.items() if own is not parameter]
