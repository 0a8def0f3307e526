"""Kernel sets for a transformer block, and the choice of a set on a CPU."""

import logging
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from treg_megatron.errors import UserError
from treg_megatron.kernels.core_attention import SdpaAttention
from treg_megatron.kernels.onednn import ProductsByOneDNN, mkl_is_slow
from treg_megatron.kernels.packed_attention import PackedSdpaAttention
from treg_megatron.kernels.private_operators import unusable_operator
from treg_megatron.kernels.rms_norm import FewPassRMSNorm, RMSNorm
from treg_megatron.kernels.rotary import rotated_by
from treg_megatron.kernels.swiglu import swiglu
from treg_megatron.kernels.varlen_attention import VarlenAttention

#: the environment variable that chooses among :data:`SETS`
VARIABLE = "TREG_CPU_KERNELS"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernels:
    """The kernels of a plain PyTorch block; each can be replaced on its own (``dataclasses.replace``).

    Attributes:
        norm: module class, constructed as ``norm(config, hidden_size, eps)``: [..., hidden] -> [..., hidden].
        activation: SwiGLU, [..., 2 * width] (gate and up concatenated) -> [..., width]; None: Megatron's own, whatever
            the activation function.
        rotary: rotary position embedding, takes x [..., d] and angles that broadcast to it, and returns the rotated x;
            None: Megatron's.
        core_attention: module class that replaces Megatron's ``DotProductAttention``.
        linear: creates the context in which linear layers and the head compute their matrix products; None: torch's
            default.
    """

    norm: type[torch.nn.Module]
    activation: Callable[[Tensor], Tensor] | None
    rotary: Callable[[Tensor, Tensor], Tensor] | None
    core_attention: type[torch.nn.Module]
    linear: Callable[[], AbstractContextManager] | None

    @staticmethod
    def reference() -> "Kernels":
        """Public torch operators and what Megatron composes from them; runs on any device."""
        return Kernels(norm=RMSNorm, activation=None, rotary=None, core_attention=SdpaAttention, linear=None)

    @staticmethod
    def gpu() -> "Kernels":
        """The reference set, with one attention call per packed sequence where torch has a kernel for it."""
        return replace(Kernels.reference(), core_attention=VarlenAttention)

    @staticmethod
    def fast_cpu() -> "Kernels":
        """Fewer passes over memory, one attention call per packed sequence, and oneDNN's matmul where MKL is slow."""
        return Kernels(
            norm=FewPassRMSNorm,
            activation=swiglu,
            rotary=rotated_by,
            core_attention=PackedSdpaAttention,
            linear=ProductsByOneDNN if mkl_is_slow() else None,
        )


SETS = {"fast": Kernels.fast_cpu, "reference": Kernels.reference}


def cpu_kernels() -> Kernels:
    """The kernels of :func:`cpu_set`.

    Raises:
        UserError: as :func:`cpu_set`.
    """
    return SETS[cpu_set()]()


def cpu_set() -> str:
    """The name of the set that ``TREG_CPU_KERNELS`` asks for, ``fast`` by default.

    The fast set needs private torch operators. If the installed torch lacks one, or its arguments differ, the reference
    set is used instead, and one line is logged.

    Raises:
        UserError: the variable does not name a set.
    """
    name = os.environ.get(VARIABLE) or "fast"
    if name not in SETS:
        raise UserError(f"{VARIABLE}={name}: choose one of {', '.join(SETS)}")
    if name == "fast" and _log_unusable(unusable_operator()):
        return "reference"
    return name


@cache  # one line per process
def _log_unusable(problem: str | None) -> bool:
    if problem is not None:
        _log.warning("torch %s: %s; the CPU runs the reference kernels, which are slower", torch.__version__, problem)
    return problem is not None
