"""The fused SwiGLU against its formula."""

import pytest
import torch
import torch.nn.functional as F

from treg_megatron.kernels.swiglu import swiglu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_autograd(dtype):
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(5, 2, 12, generator=generator).to(dtype).requires_grad_()
    upstream = torch.randn(5, 2, 6, generator=generator).to(dtype)
    gate, up = both.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    found = swiglu(both)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(value, both, upstream)[0] for value in (found, expected)))
