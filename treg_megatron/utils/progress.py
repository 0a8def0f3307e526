"""Progress, throughput and remaining time of a step, on stderr."""

import sys
import threading
import time


class Progress:
    """A progress bar on a terminal, an occasional line in a log file; a context manager.

    Rates and remaining time count only the items processed here, not those that an earlier job finished or that were
    skipped at no cost.

    Args:
        step: the name of the step, with which the bar begins.
        unit: what is counted, in the plural.
        total: number of items.
        done: number of items that an earlier job finished.
        shown: False on ranks that print nothing.
    """

    def __init__(self, step: str, unit: str, total: int, done: int = 0, shown: bool = True):
        from tqdm import tqdm

        # tqdm's own is shared with forked processes, which would wait for ever for one that was killed while it held it
        tqdm.set_lock(threading.RLock())
        self._unit, self._start, self._worked, self._tokens = unit, time.monotonic(), 0, 0
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=step,
            dynamic_ncols=True,
            disable=not shown,
            mininterval=0.2 if sys.stderr.isatty() else 30,
            bar_format="{desc}: {percentage:3.0f}% |{bar:20}| {n_fmt}/{total_fmt} " + unit + "{postfix}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skipped(self, count: int) -> None:
        """Record ``count`` more items as skipped."""
        self._bar.update(count)

    def worked(self, count: int, tokens: int) -> None:
        """Record ``count`` more items as done; ``tokens`` went through the model since the last call."""
        self._worked += count
        self._tokens += tokens
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._worked / seconds
        left = (self._bar.total - self._bar.n - count) / rate if rate else float("inf")
        throughput = f"{self._tokens / seconds:,.0f} tokens/s, " if self._tokens else ""  # a server need not tell
        self._bar.set_postfix_str(f"{rate:,.2f} {self._unit}/s, {throughput}{_duration(left)} left", refresh=False)
        self._bar.update(count)


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown"
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
