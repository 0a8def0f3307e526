"""A compact set of strings, to find repeats in large files."""

import numpy as np

_FEW = 1 << 14


class StringSet:
    """A growing set of strings that stores 64-bit hashes alone, 8 to 14 bytes each; a Python set takes ten times that.

    The chance that any two of a million strings share a hash is one in 30 million.
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
        """Add a string that is not in the set yet."""
        self._recent.add(hash(text))
        if len(self._recent) > max(_FEW, len(self._sorted) // 16):
            recent = np.fromiter(self._recent, dtype=np.int64, count=len(self._recent))
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort()
            self._recent.clear()
