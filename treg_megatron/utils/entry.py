"""The boundary of every command: a user error becomes one line and exit code 2; a bug keeps its traceback."""

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

from treg_megatron.errors import EXIT_BAD_INPUT, UserError
from treg_megatron.utils.log import configure_logging, is_verbose, rank_of_environment
from treg_megatron.utils.signals import end_on_signal
from treg_megatron.utils.terminal import without_control_bytes

_OF_THE_MACHINE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
RANK_ZERO_SECONDS = 20  # how long other ranks wait for rank 0 to report an error before they report it


def run(main: Callable[[], None]) -> None:
    """Run a command; what the user can mend becomes one line on stderr and exit code 2.

    That is a :class:`UserError`, and an OSError about a file, or from a disk that is full or fails. Any other exception
    is a bug, and keeps its traceback; with ``--verbose`` all do.
    """
    end_on_signal()
    if "--verbose" in sys.argv:  # read here, before the import of anything that logs
        os.environ["TREG_VERBOSE"] = "1"
    configure_logging()
    try:
        main()
    except BrokenPipeError:
        sys.exit(1)
    except (UserError, OSError) as error:
        message = _line(error)
        if message is None:
            raise
        if is_verbose():
            traceback.print_exc()
        rank = rank_of_environment()
        if rank:
            _leave_it_to_rank_zero()
        shown = without_control_bytes(message)
        print(f"error{f' on rank {rank}' if rank else ''}: {shown}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to continue", file=sys.stderr)
        sys.exit(130)


def _line(error: UserError | OSError) -> str | None:
    """The error as one line, or None if it is a bug."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    reason = error.strerror or str(error)
    if isinstance(error.filename, str | bytes | os.PathLike):
        return f"{os.fsdecode(error.filename)}: {reason}"
    return reason if error.errno in _OF_THE_MACHINE else None


def _leave_it_to_rank_zero() -> None:
    """Wait for rank 0 to report the error; return only if it does not have it.

    Most errors occur on every rank, and one line is enough. When rank 0 ends, the launcher terminates the others: they
    exit with the same code as rank 0, or the launcher would report that they were killed.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: os._exit(EXIT_BAD_INPUT))
    time.sleep(RANK_ZERO_SECONDS)
