"""RMSNorm with sequence parallelism: torch's own, and one for CPUs, where torch has no fused kernel."""

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467); weight is 1 + gamma if the config says so.

    Under sequence parallelism each rank sees part of the sequence, so the weight's gradient is partial. The parameter
    attribute ``sequence_parallel`` makes Megatron sum it over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        if not self.zero_centered:
            return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)
        # bf16 has 8 bits of precision: 1 + gamma would lose most of a small gamma
        return F.rms_norm(hidden.float(), (hidden.shape[-1],), 1 + self.weight.float(), self.eps).type_as(hidden)


class FewPassRMSNorm(RMSNorm):
    """The same in few passes over memory: on a CPU torch composes it from a dozen operations, in each direction."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., hidden_size] -> [..., hidden_size]."""
        return super().forward(hidden) if self.zero_centered else _Normalised.apply(hidden, self.weight, self.eps)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_().div_(x.shape[-1])
        inverse = rms.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).type_as(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, inverse = ctx.saved_tensors
        grad_x = (grad * weight).float()
        along = (grad_x * x).sum(dim=-1, keepdim=True).mul_(inverse**3).div_(x.shape[-1])
        grad_x.mul_(inverse).addcmul_(x.float(), along, value=-1)
        grad_weight = (grad * x).float().flatten(0, -2).T @ inverse.flatten()
        return grad_x.type_as(x), grad_weight.type_as(weight), None
