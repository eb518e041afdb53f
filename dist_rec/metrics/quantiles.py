"""Exact order statistics of int64 values that do not fit in memory and lie on several ranks.

Values are counted by their leading bits, and again, in the few intervals that hold a wanted value, by the bits after
them. Counts of ranks add up exactly, so the answer is that of a sort of all values, whoever read which. A pass takes
0.5 MiB for each wanted value; there are ceil(b / 16) passes where all values lie within 2**b of each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BITS = 16  # counted in one pass


class OrderStatistics:
    """The values that a sort would put at some positions.

    Example::

        found = OrderStatistics(low, high, [n // 2])
        while not found.done:
            for values in chunks:  # all values again in every pass
                found.add(values)
            found.narrow(sum_over_ranks(found.counts))
        median = found.values[0]
    """

    def __init__(self, low: int, high: int, positions: Sequence[int]) -> None:
        """low, high: the smallest and the largest of all values. positions: wanted, from 0, below their number."""
        self._positions = list(positions)
        self._shift = (high - low).bit_length()
        # a position's value is in self._starts + [0, 2**shift), and self._below values are smaller than the start
        self._starts = [low] * len(self._positions)
        self._below = [0] * len(self._positions)
        self._begin()

    @property
    def done(self) -> bool:
        """Whether `values` is final."""
        return self._shift == 0 or not self._positions

    @property
    def values(self) -> list[int]:
        """The value at each wanted position."""
        assert self.done, "one more pass is needed"
        return list(self._starts)

    def add(self, values: NDArray[np.int64]) -> None:
        """Counts some of this rank's values, (n,) int64, in the current pass."""
        for row, start in enumerate(self._intervals):
            # unsigned arithmetic wraps: what is below the start becomes too large
            offset = values.view(np.uint64) - np.uint64(start % 2**64)
            if self._shift < 64:
                offset = offset[offset < np.uint64(2**self._shift)]
            parts = (offset >> np.uint64(self._next)).astype(np.int64)
            self.counts[row] += np.bincount(parts, minlength=self.counts.shape[1])

    def narrow(self, counts: NDArray[np.int64]) -> None:
        """Ends a pass; counts: the sum of all ranks' `counts`."""
        totals = np.cumsum(counts, axis=1)
        for i, position in enumerate(self._positions):
            row = self._intervals.index(self._starts[i])
            part = int(np.searchsorted(totals[row], position - self._below[i], side="right"))
            self._below[i] += int(totals[row, part - 1]) if part else 0
            self._starts[i] += part << self._next
        self._shift = self._next
        self._begin()

    def _begin(self) -> None:
        self._intervals = sorted(set(self._starts))
        self._next = max(self._shift - _BITS, 0)
        self.counts = np.zeros((len(self._intervals), 2 ** (self._shift - self._next)), np.int64)
