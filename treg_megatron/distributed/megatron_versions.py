"""What differs between the supported versions of megatron-core. No other module asks which one is installed."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core import optimizer as optimizers
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer import OptimizerConfig
from nemo.utils.callbacks import dist_ckpt_io

from treg_megatron.utils.substitute import substituted


@contextlib.contextmanager
def arguments_that_nemo_passes() -> Iterator[None]:
    """Inside the block, ``get_megatron_optimizer`` takes the arguments that NeMo 2.6 and 2.7 pass.

    megatron-core 0.16 replaced three of them by ``config_overrides``. NeMo 2.7, the last with language models, still
    passes them: None, None and 1.0 unless a caller sets them, which we do not.
    """
    if takes_weight_decay_condition():
        yield
    else:
        adapted = with_config_overrides(optimizers.get_megatron_optimizer)
        with substituted(optimizers, "get_megatron_optimizer", adapted):
            yield


def takes_weight_decay_condition() -> bool:
    """Whether ``get_megatron_optimizer`` has its arguments of megatron-core 0.15."""
    return "no_weight_decay_cond" in inspect.signature(optimizers.get_megatron_optimizer).parameters


def with_config_overrides(build: Callable[..., Any]) -> Callable[..., Any]:
    """``get_megatron_optimizer`` of megatron-core 0.16 behind the signature that it had in 0.15."""

    def called_by_nemo(
        config: OptimizerConfig,
        model_chunks: list,
        no_weight_decay_cond: None = None,
        scale_lr_cond: None = None,
        lr_mult: float = 1.0,
        **others: Any,
    ) -> Any:
        if no_weight_decay_cond is not None or scale_lr_cond is not None or lr_mult != 1.0:
            raise NotImplementedError("megatron-core 0.16 takes conditions on parameters as config_overrides")
        return build(config, model_chunks, config_overrides=no_decay_of_biases_and_norms(config), **others)

    return called_by_nemo


def no_decay_of_biases_and_norms(config: OptimizerConfig) -> dict:
    """The ``config_overrides`` of what megatron-core 0.15 always did: weights decay, biases and norms do not.

    0.16 does the same when given None, which it calls temporary.
    """
    return optimizers.get_standard_config_overrides(config)


def complete_nemos_background_saves() -> None:
    """Let NeMo save in the background, for the life of the process. Idempotent.

    megatron-core 0.16 lacks the module ``strategies.tensorstore``, which NeMo 2.7 imports first in a block, and without
    which it takes Megatron for missing. Of the names that the block then lacks, these saves use the queue alone.
    """
    if not dist_ckpt_io.HAVE_MEGATRON_CORE:
        dist_ckpt_io.AsyncCallsQueue = AsyncCallsQueue
        dist_ckpt_io.HAVE_MEGATRON_CORE = True
