"""Load-balanced split of sequences over context-parallel ranks.

With causal attention the end of a sequence costs more than its beginning. Each sequence is therefore padded to a
multiple of 2 * ranks and cut into 2 * ranks equal chunks; rank r holds chunks r and 2 * ranks - 1 - r, in that order.
The split must match what attention assumes. Upstream, ``megatron.core.utils.get_batch_on_this_cp_rank`` does it for
unpacked batches and ``transformer_engine_torch.thd_get_partitioned_indices`` for each sequence of a packed (THD) batch.
"""

from typing import NamedTuple

import numpy as np
import torch


class ContextPart(NamedTuple):
    """The part of every sequence that one context-parallel rank holds.

    Attributes:
        rank: index in the context-parallel group.
        ranks: size of the group; with 1, sequences are neither split nor padded.
    """

    rank: int
    ranks: int

    @property
    def divisor(self) -> int:
        """Every padded sequence length is a multiple of this number."""
        return 1 if self.ranks == 1 else 2 * self.ranks

    @property
    def chunks(self) -> tuple[int, int]:
        """Indices of this rank's two chunks, out of 2 * ranks."""
        return self.rank, 2 * self.ranks - 1 - self.rank

    def padded(self, length: int | np.ndarray) -> int | np.ndarray:
        """Sequence length in tokens, or array of lengths, rounded up to a multiple of :attr:`divisor`."""
        return -(-length // self.divisor) * self.divisor

    def of(self, sequence: torch.Tensor) -> torch.Tensor:
        """This rank's part of a padded sequence: [padded length] -> [padded length / ranks]."""
        if self.ranks == 1:
            return sequence
        chunked = sequence.view(self.divisor, -1)
        return torch.cat([chunked[index] for index in self.chunks])

    def joined(self, parts: torch.Tensor) -> torch.Tensor:
        """Inverse of :meth:`of`: all ranks' parts, [ranks, padded length / ranks, ...] -> [padded length, ...]."""
        chunks = parts.unflatten(1, (2, -1))
        return torch.cat([chunks[:, 0].flatten(0, 1), chunks[:, 1].flip(0).flatten(0, 1)])

    def holds(self, positions: np.ndarray, width: int) -> np.ndarray:
        """Mask, bool [n], of the positions (int64 [n]) on this rank, in a sequence of padded length ``width``."""
        if self.ranks == 1:
            return np.ones(len(positions), dtype=bool)
        return np.isin(positions // (width // self.divisor), self.chunks)

    def row(self, positions: np.ndarray, width: int) -> np.ndarray:
        """Indices into the output of :meth:`of`, int64 [n], of positions that this rank holds (int64 [n])."""
        if self.ranks == 1:
            return positions
        chunk, offset = np.divmod(positions, width // self.divisor)
        return np.where(chunk == self.rank, 0, width // self.divisor) + offset


WHOLE = ContextPart(rank=0, ranks=1)
