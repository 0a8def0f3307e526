"""Megatron's linear layers with their matrix products computed in a given context."""

from collections.abc import Callable
from contextlib import AbstractContextManager

from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight, LinearWithGradAccumulationAndAsyncCommunication
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor


class _ProductsIn:
    """Mix-in for Megatron's parallel linear layers.

    Args:
        products: creates the context for the matrix products of the forward and the backward pass.
    """

    def __init__(self, *args, products: Callable[[], AbstractContextManager], **kwargs):
        super().__init__(*args, **kwargs)
        self.products = products

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gradient_accumulation_fusion: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        grad_output_buffer: list[Tensor] | None = None,
        wgrad_deferral_limit: int | None = None,
        tp_group=None,
    ) -> Tensor:
        tp_group = get_tensor_model_parallel_group_if_none(tp_group)
        if weight.requires_grad:
            return _Linear.apply(
                self.products,
                input,
                weight,
                bias,
                gradient_accumulation_fusion,
                allreduce_dgrad,
                sequence_parallel,
                grad_output_buffer,
                wgrad_deferral_limit,
                tp_group,
            )
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        return _FrozenLinear.apply(self.products, input, weight, bias, allreduce_dgrad, tp_group)


class ColumnParallelLinearIn(_ProductsIn, ColumnParallelLinear):
    """Column-parallel linear layer."""


class RowParallelLinearIn(_ProductsIn, RowParallelLinear):
    """Row-parallel linear layer."""


class _Linear(LinearWithGradAccumulationAndAsyncCommunication):
    @staticmethod
    def forward(ctx, products, *args):
        ctx.products = products
        with products():
            return LinearWithGradAccumulationAndAsyncCommunication.forward(ctx, *args)

    @staticmethod
    def backward(ctx, grad):
        with ctx.products():
            return None, *LinearWithGradAccumulationAndAsyncCommunication.backward(ctx, grad)


class _FrozenLinear(LinearWithFrozenWeight):
    @staticmethod
    def forward(ctx, products, *args):
        ctx.products = products
        with products():
            return LinearWithFrozenWeight.forward(ctx, *args)

    @staticmethod
    def backward(ctx, grad):
        with ctx.products():
            return None, *LinearWithFrozenWeight.backward(ctx, grad)
