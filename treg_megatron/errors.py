"""Errors that a user can act on, told from our own bugs.

Bad input raises :class:`UserError`; every entry point runs under :func:`run`, which prints it as one line and exits
with code 2. Anything else keeps its traceback, because then the fault is ours.
"""

import os
import sys
from collections.abc import Callable

from treg_megatron.runtime.quiet import quieten

EXIT_BAD_INPUT = 2


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where (file, row, key), and what to do about it."""


def run(main: Callable[[], None]) -> None:
    """Run an entry point, quietly; a :class:`UserError` becomes one line on stderr (rank 0 only) and exit code 2."""
    quieten()
    try:
        main()
    except UserError as error:
        if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    except BrokenPipeError:
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
