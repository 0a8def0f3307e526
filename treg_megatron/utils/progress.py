"""How far a station is, how fast it goes and how long it will take, on stderr."""

import sys
import time


class Progress:
    """A bar on a terminal, a line now and then in a log file; a context manager.

    The rates and the time left count only what was worked on: neither what an earlier job had finished, nor what was
    left out at no cost.

    Args:
        station: the word that the bar begins with.
        unit: what is counted, in the plural.
        total: how many there are, ``done`` of them finished by an earlier job.
        shown: False on ranks that keep silent.
    """

    def __init__(self, station: str, unit: str, total: int, done: int = 0, shown: bool = True):
        from tqdm import tqdm

        self._unit, self._start, self._worked, self._tokens = unit, time.monotonic(), 0, 0
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=station,
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
        """``count`` were left out."""
        self._bar.update(count)

    def worked(self, count: int, tokens: int) -> None:
        """``count`` more are done; ``tokens`` went through the model since the last call."""
        self._worked += count
        self._tokens += tokens
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = self._worked / seconds
        left = (self._bar.total - self._bar.n - count) / rate if rate else float("inf")
        self._bar.set_postfix_str(
            f"{rate:,.2f} {self._unit}/s, {self._tokens / seconds:,.0f} tokens/s, {_duration(left)} left", refresh=False
        )
        self._bar.update(count)


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown"
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
