"""A rotary position embedding that Megatron's model does not build itself: YaRN."""

from typing import Any

from megatron.core.models.gpt.gpt_model import GPTModel

from treg_megatron.kernels.rotary import yarn_frequencies


def scale_by_yarn(model: GPTModel, yarn: dict[str, Any]) -> None:
    """Give a model YaRN's angles; its attention factor is in the config's ``softmax_scale``.

    Args:
        yarn: arguments of :func:`~treg_megatron.kernels.rotary.yarn_frequencies`.
    """
    rotary = model.rotary_pos_emb
    rotary.inv_freq = yarn_frequencies(rotary.inv_freq, model.config.rotary_base, **yarn)
