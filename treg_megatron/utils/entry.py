"""The boundary of every command: a user error becomes one line and exit code 2; a bug keeps its traceback."""

import os
import signal
import sys
import time
from collections.abc import Callable

from treg_megatron.errors import EXIT_BAD_INPUT, UserError
from treg_megatron.utils.log import configure_logging, rank_of_environment

RANK_ZERO_SECONDS = 20  # how long other ranks wait for rank 0 to report an error before they report it


def run(main: Callable[[], None]) -> None:
    """Run a command; a :class:`UserError` becomes one line on stderr and exit code 2."""
    if "--verbose" in sys.argv:  # read here, before the import of anything that logs
        os.environ["TREG_VERBOSE"] = "1"
    configure_logging()
    try:
        main()
    except UserError as error:
        rank = rank_of_environment()
        if rank:
            _leave_it_to_rank_zero()
        print(f"error{f' on rank {rank}' if rank else ''}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to continue", file=sys.stderr)
        sys.exit(130)


def _leave_it_to_rank_zero() -> None:
    """Wait for rank 0 to report the error; return only if it does not have it.

    Most errors occur on every rank, and one line is enough. When rank 0 ends, the launcher terminates the others: they
    exit with the same code as rank 0, or the launcher would report that they were killed.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_BAD_INPUT))
    time.sleep(RANK_ZERO_SECONDS)
