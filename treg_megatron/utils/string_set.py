"""Compact sets of strings and of hashes, to find repeats in large files."""

import numpy as np

_FEW = 1 << 14


class HashSet:
    """A growing set of 64-bit numbers, 8 to 14 bytes each; a Python set takes several times that."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, dtype=np.int64)
        self._recent: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def __contains__(self, number: int) -> bool:
        if number in self._recent:
            return True
        at = self._sorted.searchsorted(np.int64(number))
        return bool(at < len(self._sorted) and self._sorted[at] == number)

    def isdisjoint(self, numbers: list[int]) -> bool:
        """Whether none of some numbers is in the set."""
        if not len(self._sorted):
            return self._recent.isdisjoint(numbers)
        sought = np.array(numbers, dtype=np.int64)
        at = np.minimum(self._sorted.searchsorted(sought), len(self._sorted) - 1)
        return self._recent.isdisjoint(numbers) and not (self._sorted[at] == sought).any()

    def add(self, *numbers: int) -> None:
        """Add numbers that are not in the set yet."""
        self._recent.update(numbers)
        if len(self._recent) > max(_FEW, len(self._sorted) // 16):
            recent = np.fromiter(self._recent, dtype=np.int64, count=len(self._recent))
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort()
            self._recent.clear()


class StringSet:
    """A growing set of strings that stores 64-bit hashes alone.

    The chance that any two of a million strings share a hash is one in 30 million.
    """

    def __init__(self) -> None:
        self._hashes = HashSet()

    def __len__(self) -> int:
        return len(self._hashes)

    def __contains__(self, text: str) -> bool:
        return hash(text) in self._hashes

    def add(self, text: str) -> None:
        """Add a string that is not in the set yet."""
        self._hashes.add(hash(text))
