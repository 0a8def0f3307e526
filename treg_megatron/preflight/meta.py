"""Megatron on meta tensors: shapes without data, with the kernels that the real device would use."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode

from treg_megatron.distributed.cpu_redirect import backward_in


@contextlib.contextmanager
def on_meta(gpu: bool) -> Iterator[None]:
    """Activate :class:`OnMeta` for every torch call, including those of backward passes.

    torch disables a mode while it runs a call that the mode intercepted, such as the backward pass of recomputed
    layers. ``distributed.cpu_redirect`` re-enables its own mode there with the same patch. That patch is replaced here,
    because its mode would take precedence over this one.
    """
    previous = torch.autograd._engine_run_backward
    mode = OnMeta(gpu)

    with mode:
        torch.autograd._engine_run_backward = backward_in([mode], _engine_run_backward)
        try:
            yield
        finally:
            torch.autograd._engine_run_backward = previous


class OnMeta(TorchFunctionMode):
    """Redirects CUDA allocations to the meta device, and substitutes the result of operations that depend on data.

    Meta tensors have no fused kernels and would use the implementation that saves the most for the backward pass. This
    mode uses what real devices use: attention that saves queries, keys, values, outputs and one float per query and
    head; on a GPU also a norm that saves its input and one float per token.

    Args:
        gpu: whether the real device is a GPU; CPUs have no fused norm.
    """

    def __init__(self, gpu: bool):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if type(device) is int or (device is not None and str(device).startswith("cuda")):
            kwargs["device"] = torch.device("meta")
        if func is Tensor.cuda:
            return args[0].to("meta")
        if not args or not isinstance(args[0], Tensor) or not args[0].is_meta:
            return func(*args, **kwargs)
        if func is Tensor.type and len(args) == 1:
            return func(*args).replace("meta.", "")  # the distributed optimizer groups parameters by this name
        if func is F.scaled_dot_product_attention:
            return _flash_attention(*args, **kwargs)
        if func is F.rms_norm and self.gpu:
            return _fused_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _fused_norm(hidden: Tensor, normalized_shape: tuple[int, ...], weight: Tensor, eps: float) -> Tensor:
    return _FusedNorm.apply(hidden, weight)


class _FusedNorm(torch.autograd.Function):
    """RMSNorm that allocates what a fused kernel would: it saves its input, the weight and one fp32 value per token."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight, hidden.new_empty((*hidden.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)
