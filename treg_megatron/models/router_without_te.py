"""Workaround for Megatron-core's router where Transformer Engine is not installed."""

from megatron.core.transformer.moe import moe_utils


def define_te_general_gemm() -> None:
    """Give ``moe_utils`` the name ``te_general_gemm``, for the life of the process. Idempotent.

    Megatron 0.15 asks whether it is None, and defines it only where Transformer Engine is installed.
    """
    moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
