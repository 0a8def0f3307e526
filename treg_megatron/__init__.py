"""T-REG: token-level reward regularization for preference optimization, on NeMo and Megatron-core."""

__version__ = "0.1.0"
