"""Which part of a sequence a context-parallel rank holds.

Causal attention costs the end of a sequence more than its beginning. Megatron and Transformer Engine therefore cut each
packed sequence into 2 * ranks equal pieces and give rank r the pieces r and 2 * ranks - 1 - r, one after the other; the
sequence is padded to a multiple of 2 * ranks for it.
"""

from typing import NamedTuple

import numpy as np
import torch


class ContextPart(NamedTuple):
    """One rank's part of every sequence."""

    rank: int
    ranks: int

    @property
    def divisor(self) -> int:
        """What the length of a sequence must be a multiple of."""
        return 1 if self.ranks == 1 else 2 * self.ranks

    @property
    def pieces(self) -> tuple[int, int]:
        """Numbers of this rank's two pieces."""
        return self.rank, 2 * self.ranks - 1 - self.rank

    def padded(self, length: int | np.ndarray) -> int | np.ndarray:
        """The length after padding."""
        return -(-length // self.divisor) * self.divisor

    def of(self, sequence: torch.Tensor) -> torch.Tensor:
        """[padded length] -> [padded length / ranks]: what this rank holds."""
        if self.ranks == 1:
            return sequence
        pieces = sequence.view(self.divisor, -1)
        return torch.cat([pieces[number] for number in self.pieces])

    def whole(self, parts: torch.Tensor) -> torch.Tensor:
        """[ranks, padded length / ranks, ...], what :meth:`of` gave each rank -> [padded length, ...]."""
        pieces = parts.unflatten(1, (2, -1))
        return torch.cat([pieces[:, 0].flatten(0, 1), pieces[:, 1].flip(0).flatten(0, 1)])

    def holds(self, positions: np.ndarray, width: int) -> np.ndarray:
        """[n] bool: which positions of a sequence of padded length ``width`` lie on this rank."""
        if self.ranks == 1:
            return np.ones(len(positions), dtype=bool)
        return np.isin(positions // (width // self.divisor), self.pieces)

    def row(self, positions: np.ndarray, width: int) -> np.ndarray:
        """[n] int64: where positions that this rank holds stand in what :meth:`of` gives."""
        if self.ranks == 1:
            return positions
        piece, offset = np.divmod(positions, width // self.divisor)
        return np.where(piece == self.rank, 0, width // self.divisor) + offset


WHOLE = ContextPart(rank=0, ranks=1)
