"""CPU replacements: matrix products with oneDNN, and collectives in groups of one rank."""

import pytest
import torch
import torch.nn.functional as F

from treg_megatron.distributed.cpu_redirect import _unless_in_place
from treg_megatron.kernels import onednn

LARGE = (2, 130, 257)  # [..., k]; with 300 columns it is large enough for a kernel


@pytest.fixture
def slow_mkl(monkeypatch):
    """Make the tests independent of the processor: pretend that MKL is slow."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)


@pytest.mark.parametrize("func", [torch.matmul, torch.Tensor.matmul, torch.mm], ids=lambda f: f.__qualname__)
@pytest.mark.parametrize("transposed", [False, True])
def test_product_equals_torchs(func, transposed, slow_mkl):
    generator = torch.Generator().manual_seed(3)
    shape = LARGE[1:] if func is torch.mm else LARGE
    a = torch.randn(shape, generator=generator)
    b = torch.randn(300, 257, generator=generator).t() if transposed else torch.randn(257, 300, generator=generator)
    a = torch.cat([a, a], dim=-2)
    with torch.no_grad():
        ours = onednn.product_of(func, (a, b), {})
    exact = a.double() @ b.double()
    assert (ours - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("bias", [(), (None,), (torch.arange(300.0),)], ids=["no bias", "None", "bias"])
def test_linear_layer_equals_torchs(bias, slow_mkl):
    generator = torch.Generator().manual_seed(3)
    x, weight = torch.randn(LARGE, generator=generator), torch.randn(300, 257, generator=generator)
    x = torch.cat([x, x])
    with torch.no_grad():
        ours = onednn.product_of(F.linear, (x, weight, *bias), {})
    exact = x.double() @ weight.double().t() + (bias[0] if bias and bias[0] is not None else 0)
    assert (ours - exact).norm() <= 1e-6 * exact.norm()


def test_products_left_to_mkl(slow_mkl, monkeypatch):
    a, b = torch.zeros(512, 512), torch.zeros(512, 512)
    others = {
        "small": (a[:10], b),
        "bf16": (a.bfloat16(), b.bfloat16()),
        "transposed, as of a weight's gradient": (a.t(), b),
        "batched": (a[None], b[None]),
        "a vector": (a, b[0]),
    }
    with torch.no_grad():
        assert onednn.product_of(torch.mm, (a, b), {}) is not None
        for name, pair in others.items():
            assert onednn.product_of(torch.matmul, pair, {}) is None, name
        assert onednn.product_of(torch.mm, (a, b), {"out": a.clone()}) is None
        assert onednn.product_of(torch.add, (a, b), {}) is None
    assert onednn.product_of(torch.mm, (a, b), {}) is None, "autograd would not see it"
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: False)
    with torch.no_grad():
        assert onednn.product_of(torch.mm, (a, b), {}) is None


def test_a_single_rank_copies_nothing_to_itself():
    calls = []
    collective = _unless_in_place(lambda output, input, *args, **kwargs: calls.append((output, input, args, kwargs)))
    buffer = torch.zeros(8)
    assert collective(buffer, buffer.view(-1), "group", async_op=True) is None and not calls
    collective(buffer, buffer[:4], "group", async_op=True)  # one of two ranks
    collective(buffer, torch.zeros(8), "group", async_op=True)  # other memory
    assert len(calls) == 2 and calls[0][2:] == (("group",), {"async_op": True})
