"""Megatron on meta tensors: shapes without bytes, on the kernels that the real device would take."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class OnMeta(TorchFunctionMode):
    """Puts what asks for the CUDA device on the meta device, and answers there for what depends on data.

    A meta tensor has no fused kernel for attention and would take the one that keeps the score matrix; here it takes
    the one that every real device takes, which keeps queries, keys, values, outputs and a float a row.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if type(device) is int or (device is not None and str(device).startswith("cuda")):
            kwargs["device"] = torch.device("meta")
        if func is torch.Tensor.cuda:
            return args[0].to("meta")
        if func is torch.Tensor.type and len(args) == 1 and args[0].is_meta:
            return func(*args).replace("meta.", "")  # the distributed optimizer sorts parameters by their type's name
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _flash_attention(*args, **kwargs)
        if func is torch.Tensor.nonzero and args[0].is_meta:
            return args[0].new_empty((0, args[0].dim()), dtype=torch.int64)
        return func(*args, **kwargs)


def _flash_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
