"""Random numbers as functions of (seed, purpose, step, row): nothing to resume, and the same on any number of ranks.

A row is its place in the global batch, so that W ranks of B rows draw what one rank of W * B rows draws.
"""

from __future__ import annotations

import zlib

import numpy as np

from dist_rec.data.ids import mix64

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's increment


class Draws:
    """The numbers of one step.

    Args:
        seed: of the run. purpose: streams of different purposes are independent. step: the training step.
    """

    def __init__(self, seed: int, purpose: str, step: int) -> None:
        self._key = (seed, zlib.crc32(purpose.encode()), step)

    def bits(self, what: str, rows: np.ndarray) -> np.ndarray:
        """(n,) uint64, uniform, for (n,) rows; streams of different names are independent."""
        return bits(np.random.SeedSequence((*self._key, zlib.crc32(what.encode()))).generate_state(1, np.uint64), rows)

    def below(self, size: int, what: str, rows: np.ndarray) -> np.ndarray:
        """(n,) int64 uniform in 0 .. size-1, to within size / 2**64."""
        return (self.bits(what, rows) % np.uint64(size)).astype(np.int64)

    def order(self, size: int, what: str) -> np.ndarray:
        """A permutation of 0 .. size-1, the same for every row and rank."""
        return np.argsort(self.bits(what, np.arange(size)), kind="stable")


def bits(state: np.ndarray, index: np.ndarray) -> np.ndarray:
    """(n,) uint64: number `index` of the splitmix64 stream that begins at `state`, (1,) or (n,) uint64."""
    return mix64(state + (index.astype(np.uint64) + np.uint64(1)) * _GAMMA)


def chance(numbers: np.ndarray, probability: float) -> np.ndarray:
    """(n,) bool, true with that probability, from uniform uint64 numbers."""
    return (numbers >> np.uint64(11)) < np.uint64(round(probability * 2**53))
