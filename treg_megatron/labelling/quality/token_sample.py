"""A uniform sample of tokens, for what needs them sorted: quantiles and ranks."""

import numpy as np

SEED = 20


class TokenSample:
    """At most ``size`` of the rows that come in batches, drawn without replacement; all of them if they are no more.

    Every row draws a priority, and those with the lowest stay. The draw depends on the order of the rows alone.
    """

    def __init__(self, size: int):
        self._size = size
        self._random = np.random.default_rng(SEED)
        self._rows: list[np.ndarray] = []
        self._priorities: list[np.ndarray] = []
        self._limit = 1.0

    def add(self, rows: np.ndarray) -> None:
        """Take in rows, [n, columns]."""
        priorities = self._random.random(len(rows))
        candidates = priorities < self._limit
        self._rows.append(rows[candidates])
        self._priorities.append(priorities[candidates])
        if sum(map(len, self._priorities)) > 2 * self._size:
            self._shrink()

    def rows(self) -> np.ndarray:
        """The sample, [at most size, columns], in the order in which the rows came."""
        self._shrink()
        return self._rows[0]

    def _shrink(self) -> None:
        rows, priorities = np.concatenate(self._rows), np.concatenate(self._priorities)
        if len(rows) > self._size:
            kept = np.sort(np.argpartition(priorities, self._size)[: self._size])
            rows, priorities = rows[kept], priorities[kept]
            self._limit = float(priorities.max())
        self._rows, self._priorities = [rows], [priorities]
