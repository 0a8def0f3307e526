"""silu(gate) * up in few passes over memory, where no compiler fuses it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_and_up: Tensor) -> Tensor:
    """[..., 2 * width], gate and up side by side -> [..., width] (arXiv 2002.05202, equation 6).

    The backward pass writes the two gradients where they belong and keeps nothing but the input; autograd's would put
    them together in another pass, and keep silu(gate) and a copy of up.
    """
    return _SwiGLU.apply(gate_and_up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_and_up):
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        [gate_and_up] = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_and_up)
        grad_gate, grad_up = grads.chunk(2, dim=-1)
        activated = F.silu(gate)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward(torch.mul(grad, up, out=activated), gate, grad_input=grad_gate)
        return grads
