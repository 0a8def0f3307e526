"""Shapes of what pipeline stages send one another, known to every stage's host without asking.

Rows differ in length. Megatron therefore sends the shape of each tensor ahead of it, and the receiving host waits for
its GPU to read it. But all stages read the same micro-batches: the hidden states that a stage waits for are those of
the row that it reads next, and the gradients that come back are those of what it has sent, in the same order.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from treg_megatron.utils.substitute import substituted

Shape = tuple[int, ...]


def with_known_shapes(schedule: Callable[..., Any]) -> Callable[..., Any]:
    """One of Megatron's schedules, without the exchange of shapes between its stages.

    Only the 1F1B schedule has one; any other is returned as it is. ``data_iterator`` yields micro-batches as
    :func:`treg_megatron.data.collate.collate` describes them, or tuples that begin with one.
    """
    if schedule is not schedules.forward_backward_pipelining_without_interleaving:
        return schedule

    @functools.wraps(schedule)
    def run(*, data_iterator: Iterable[Any], **arguments: Any) -> Any:
        micro_batches = LookAhead(data_iterator)
        with substituted(schedules, "P2PCommunicator", functools.partial(KnownShapes, micro_batches)):
            return schedule(data_iterator=micro_batches, **arguments)

    return run


class LookAhead:
    """An iterator whose next value can be seen before it is taken."""

    def __init__(self, values: Iterable[Any]):
        self._values = iter(values)
        self._seen: list[Any] = []

    def __iter__(self) -> "LookAhead":
        return self

    def __next__(self) -> Any:
        return self._seen.pop() if self._seen else next(self._values)

    def peek(self) -> Any:
        """The next value, which stays the next."""
        if not self._seen:
            self._seen.append(next(self._values))
        return self._seen[0]


class KnownShapes(P2PCommunicator):
    """Megatron's communication of a stage with its neighbours during one step of the 1F1B schedule.

    Args:
        micro_batches: those of the step, of which the schedule takes one for each hidden states that it has received.
    """

    def __init__(self, micro_batches: LookAhead, pp_group: Any, config: Any):
        super().__init__(pp_group=pp_group, config=config)
        self._micro_batches = micro_batches
        self._without_gradient: deque[Shape] = deque()

    def _communicate_shapes(
        self, tensor_send_next: Any, tensor_send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape | None, Shape | None]:
        """Shapes of the tensors that come from the previous and from the next stage, None where none comes."""
        if tensor_send_next is not None:
            self._without_gradient.append(tuple(tensor_send_next.shape))
        return (
            self._of_next_micro_batch() if recv_prev else None,
            self._without_gradient.popleft() if recv_next else None,
        )

    def _of_next_micro_batch(self) -> Shape:
        """[s, b, hidden] of this rank: context parallelism has split s already, sequence parallelism splits it here."""
        batch = self._micro_batches.peek()
        rows, tokens = (batch[0] if isinstance(batch, tuple) else batch)["tokens"].shape
        parts = parallel_state.get_tensor_model_parallel_world_size() if self.config.sequence_parallel else 1
        return tokens // parts, rows, self.config.hidden_size
