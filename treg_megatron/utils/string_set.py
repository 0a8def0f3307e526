"""What came before, in little memory."""

import numpy as np

_FEW = 1 << 14


class Seen:
    """A growing set of texts that keeps 8 to 14 bytes of each, its 64-bit hash; a set of Python takes ten times that.

    Two of a million texts share a hash by chance once in 30 million runs.
    """

    def __init__(self):
        self._sorted = np.zeros(0, dtype=np.int64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, text: str) -> bool:
        number = hash(text)
        if number in self._recent:
            return True
        at = self._sorted.searchsorted(np.int64(number))
        return bool(at < len(self._sorted) and self._sorted[at] == number)

    def add(self, text: str) -> None:
        """Add a text that is not there yet."""
        self._recent.add(hash(text))
        if len(self._recent) > max(_FEW, len(self._sorted) // 16):
            recent = np.fromiter(self._recent, dtype=np.int64, count=len(self._recent))
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort()
            self._recent.clear()
