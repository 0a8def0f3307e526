"""Correlations between columns of any length: Pearson's from sums, Spearman's from ranks."""

import numpy as np

from treg_megatron.labelling.squash import average_ranks


class Correlations:
    """Pearson's correlations between ``columns`` columns, whose rows come in batches."""

    def __init__(self, columns: int):
        self.count = 0
        self._origin = np.zeros(columns)
        self._sums = np.zeros(columns)
        self._products = np.zeros((columns, columns))

    def add(self, rows: np.ndarray) -> None:
        """Take in rows, [n, columns] float64; a nan makes every correlation of its column unknown."""
        if not self.count:
            self._origin = rows[0]
        rows = rows - self._origin  # exactly 0 in a constant column
        self.count += len(rows)
        self._sums += rows.sum(axis=0)
        self._products += rows.T @ rows

    def matrix(self) -> np.ndarray:
        """[columns, columns] float64; nan where a column is constant or not known everywhere."""
        centred = self._products - np.outer(self._sums, self._sums) / max(self.count, 1)
        variances = np.diag(centred)
        scale = np.sqrt(np.where(variances > 0, variances, np.nan))
        return np.clip(centred / np.outer(scale, scale), -1, 1)


def correlations(rows: np.ndarray) -> np.ndarray:
    """Pearson's correlations between the columns of ``rows``, [n, k] -> [k, k]; see :class:`Correlations`."""
    sums = Correlations(rows.shape[1])
    if len(rows):
        sums.add(rows.astype(np.float64))
    return sums.matrix()


def rank_correlations(rows: np.ndarray) -> np.ndarray:
    """Spearman's correlations: those of the ranks, where equal values share the mean of their ranks; [n, k] -> [k, k].

    nan where a column is constant or not known everywhere.
    """
    ranks = np.full(rows.shape, np.nan)
    for column, values in enumerate(rows.T):
        if not np.isnan(values).any():
            ranks[:, column] = average_ranks(values)
    return correlations(ranks)
