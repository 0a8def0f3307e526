"""silu(gate) * up in few passes over memory, without a compiler to fuse it."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_and_up: Tensor) -> Tensor:
    """[..., 2 * width], gate and up concatenated -> [..., width] (arXiv 2002.05202, equation 6).

    Only the input is saved for the backward pass, which writes both gradients directly into one tensor. Autograd would
    also save silu(gate) and a copy of up, and concatenate the gradients in another pass.
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
