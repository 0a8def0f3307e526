"""Megatron's 1F1B pipeline schedule, plain or interleaved: the order of micro-batches on a stage.

Follows ``megatron.core.pipeline_parallel.schedules``: ``get_pp_rank_microbatches`` for the warm-up,
``get_schedule_table`` for the order of model chunks (in groups of as many micro-batches as there are stages).
"""

from typing import NamedTuple

FORWARD, BACKWARD = "forward", "backward"


class Event(NamedTuple):
    """Forward or backward pass of a micro-batch through one model chunk."""

    kind: str
    chunk: int


def events(stage: int, stages: int, chunks: int, micro_batches: int) -> list[Event]:
    """All passes that a stage runs in a step, in order.

    Args:
        stage, stages: index of this pipeline stage, and their number.
        chunks: model chunks per stage; more than one means the interleaved schedule.
        micro_batches: per data-parallel rank and step.
    """
    total = micro_batches * chunks
    warm_up = stages - stage - 1 if chunks == 1 else (stages - stage - 1) * 2 + (chunks - 1) * stages
    warm_up = min(warm_up, total) if stages > 1 else 0
    order = [
        chunk
        for start in range(0, micro_batches, stages)
        for chunk in range(chunks)
        for _ in range(start, min(start + stages, micro_batches))
    ]
    forward = [Event(FORWARD, chunk) for chunk in order]
    backward = [Event(BACKWARD, chunks - 1 - chunk) for chunk in order]
    steady = [event for pair in zip(forward[warm_up:], backward, strict=False) for event in pair]
    return forward[:warm_up] + steady + backward[total - warm_up :]
