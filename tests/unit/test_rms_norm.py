"""RMSNorm against its formula in float64."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from treg_megatron.kernels.rms_norm import FewPassRMSNorm, RMSNorm


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("zero_centered", [False, True], ids=["gamma", "1 + gamma"])
@pytest.mark.parametrize("norm_class", [RMSNorm, FewPassRMSNorm])
def test_equals_the_formula(norm_class, dtype, tolerance, zero_centered):
    generator = torch.Generator().manual_seed(0)
    norm = norm_class(
        TransformerConfig(
            num_layers=1,
            hidden_size=64,
            num_attention_heads=1,
            params_dtype=dtype,
            layernorm_zero_centered_gamma=zero_centered,
        ),
        64,
        eps=1e-3,
    )
    norm.weight.data = torch.randn(64, generator=generator).to(dtype)
    x = (3 * torch.randn(5, 2, 64, generator=generator)).to(dtype).requires_grad_()
    upstream = torch.randn(5, 2, 64, generator=generator).to(dtype)
    found = norm(x)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * (weight + zero_centered)
    assert found.dtype == dtype
    for ours, theirs in zip(
        (found, *torch.autograd.grad(found, (x, norm.weight), upstream)),
        (expected, *torch.autograd.grad(expected, (wide, weight), upstream.double())),
    ):
        assert (ours - theirs).norm() < tolerance * theirs.norm()
