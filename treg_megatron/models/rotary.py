"""Rotary position embeddings that Megatron's model does not build itself: YaRN, and two bases in one model."""

from typing import Any

from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor, cat, nn

from treg_megatron.kernels.rotary import yarn_frequencies


def scale_by_yarn(model: GPTModel, yarn: dict[str, Any]) -> None:
    """Give a model YaRN's angles; its attention factor is in the config's ``softmax_scale``.

    Args:
        yarn: arguments of :func:`~treg_megatron.kernels.rotary.yarn_frequencies`.
    """
    rotary = model.rotary_pos_emb
    rotary.inv_freq = yarn_frequencies(rotary.inv_freq, model.config.rotary_base, **yarn)


class LocalAndGlobalRotary(nn.Module):
    """Two embeddings side by side: each layer takes the half that belongs to it, see :func:`halves`."""

    def __init__(self, local: RotaryEmbedding, everywhere: RotaryEmbedding):
        super().__init__()
        self.local, self.everywhere = local, everywhere

    def forward(self, *args, **kwargs) -> Tensor:
        """Angles [s, 1, 1, 2 d], those of local attention first."""
        return cat([self.local(*args, **kwargs), self.everywhere(*args, **kwargs)], dim=-1)

    def get_rotary_seq_len(self, *args, **kwargs) -> int:
        """See Megatron's."""
        return self.everywhere.get_rotary_seq_len(*args, **kwargs)


def add_local_rotary(model: GPTModel, base: float) -> None:
    """Give a model a second rotary embedding, unscaled, for the layers whose attention is local."""
    config = model.config
    local = RotaryEmbedding(
        config.kv_channels,
        rotary_percent=1.0,
        rotary_base=base,
        use_cpu_initialization=config.use_cpu_initialization,
    )
    model.rotary_pos_emb = LocalAndGlobalRotary(local, model.rotary_pos_emb)


def halves(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Local and global angles, [..., 2 d] -> 2 x [..., d]; kept on the tensor, which all layers share, because the
    halves keep their cosines."""
    kept = angles.__dict__.setdefault("halves", [])
    if not kept:
        kept += angles.chunk(2, dim=-1)
    return kept[0], kept[1]
