"""How many micro-batches are between the start of their forward pass and the end of their backward pass."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules


def watch_micro_batches(changed: Callable[[int], None]) -> None:
    """Call ``changed`` with the number of micro-batches in flight whenever it changes, for the life of the process.

    An error ends all of them.
    """
    forward_step, backward_step = schedules.forward_step, schedules.backward_step
    in_flight = 0

    def now(number: int) -> None:
        nonlocal in_flight
        in_flight = number
        changed(number)

    @contextlib.contextmanager
    def none_after_an_error() -> Iterator[None]:
        try:
            yield
        except BaseException:
            now(0)
            raise

    @none_after_an_error()
    def forward_of_a_micro_batch(*args: Any, **kwargs: Any) -> Any:
        now(in_flight + 1)
        result = forward_step(*args, **kwargs)
        if not torch.is_grad_enabled():
            now(in_flight - 1)  # no backward pass follows
        return result

    @none_after_an_error()
    def backward_of_a_micro_batch(*args: Any, **kwargs: Any) -> Any:
        result = backward_step(*args, **kwargs)
        now(in_flight - 1)
        return result

    schedules.forward_step, schedules.backward_step = forward_of_a_micro_batch, backward_of_a_micro_batch
