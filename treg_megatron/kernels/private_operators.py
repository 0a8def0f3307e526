"""A start-up check of the private torch operators that the fast CPU kernels call."""

from functools import cache

import torch

from treg_megatron.kernels.onednn import mkl_is_slow

#: (namespace, name, overload) of each operator, and the arguments passed to it, in order
OPERATORS = {
    ("aten", "_scaled_dot_product_flash_attention_for_cpu", "default"): (
        "query key value dropout_p is_causal attn_mask scale"
    ),
    ("aten", "_scaled_dot_product_flash_attention_for_cpu_backward", "default"): (
        "grad_out query key value out logsumexp dropout_p is_causal attn_mask scale"
    ),
    ("aten", "silu_backward", "grad_input"): "grad_output self grad_input",
}
ONEDNN = {("mkldnn", "_linear_pointwise", "default"): "X W B attr scalars algorithm"}


@cache
def unusable_operator() -> str | None:
    """What is wrong with the first operator that is missing or takes other arguments in this torch; None: nothing."""
    for (namespace, name, overload), ours in (OPERATORS | (ONEDNN if mkl_is_slow() else {})).items():
        found = arguments_of(namespace, name, overload)
        if found is None:
            return f"{namespace}::{name} is missing"
        names = [argument.name for argument in found]
        passed = ours.split()
        more_required = any(not argument.has_default_value() for argument in found[len(passed) :])
        if names[: len(passed)] != passed or more_required:
            return f"{namespace}::{name} takes {', '.join(names)} instead of {', '.join(passed)}"
    return None


def arguments_of(namespace: str, name: str, overload: str) -> list[torch.Argument] | None:
    """The arguments in an operator's schema; None if it does not exist."""
    try:
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema.arguments
    except AttributeError:
        return None
