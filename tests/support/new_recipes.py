"""`treg recipe new` in a process of its own."""

import time
from typing import NamedTuple

from tests.support.forked import run_ranks
from treg_megatron.errors import UserError


class Made(NamedTuple):
    error: str | None  # of a refusal
    cpu_seconds: float


def new_in_this_process(arguments: list[str]) -> Made:
    from treg_megatron.cli import recipe

    start = time.process_time()
    try:
        recipe.run(recipe.parser().parse_args(["new", *arguments]))
    except UserError as error:
        return Made(str(error), time.process_time() - start)
    return Made(None, time.process_time() - start)


def new_recipe(*arguments: str) -> Made:
    return run_ranks(1, new_in_this_process, list(arguments))[0]
