"""Transformer Engine's buffers, in which tensor-parallel communication overlaps with the matrix products beside it."""

import lightning.pytorch as pl
from megatron.core import parallel_state


class OverlapBuffers(pl.Callback):
    """Makes the buffers before the first forward pass; ranks of a tensor-parallel group share them.

    Args:
        tokens: length of every row on a context-parallel rank, before sequence parallelism splits it.
        hidden: width of the hidden states.
    """

    def __init__(self, tokens: int, hidden: int):
        self.shape = [tokens, hidden]

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        from transformer_engine.pytorch.module import base

        base.initialize_ub(
            self.shape,
            parallel_state.get_tensor_model_parallel_world_size(),
            quantization_modes=[base.UserBufferQuantizationMode.NONE],
            bootstrap_backend="nccl",
        )
