"""Exact order statistics against a sort, for every range of int64, however the values are split."""

from __future__ import annotations

import numpy as np
import pytest

from dist_rec.metrics.quantiles import OrderStatistics

LIMITS = np.iinfo(np.int64)


def found(values: np.ndarray, positions: list[int], parts: int = 3) -> tuple[list[int], int]:
    """(the values at `positions` from `parts` ranks that each hold some of the values, passes)."""
    ranks = [OrderStatistics(int(values.min()), int(values.max()), positions) for _ in range(parts)]
    passes = 0
    while not ranks[0].done:
        for rank, share in zip(ranks, np.array_split(values, parts), strict=True):
            for chunk in np.array_split(share, 2):
                rank.add(chunk)
        total = sum(rank.counts for rank in ranks)
        for rank in ranks:
            rank.narrow(total)
        passes += 1
    assert all(rank.values == ranks[0].values for rank in ranks)
    return ranks[0].values, passes


def draw(kind: str, n: int = 5000) -> np.ndarray:
    rng = np.random.default_rng(7)
    return {
        "ages": rng.integers(7, 74, n),
        "ties": np.where(rng.random(n) < 0.6, 0, rng.integers(-3, 2**40, n)),
        "revenue": (np.exp(rng.normal(5, 3, n)) * 100).astype(np.int64),
        "times": rng.integers(1_600_000_000, 1_700_000_000, n),
        "everything": rng.integers(LIMITS.min, LIMITS.max, n, endpoint=True),
        "ends": np.where(rng.random(n) < 0.5, LIMITS.min, LIMITS.max),
        "one": np.full(n, -5),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "passes"),
    [("ages", 1), ("ties", 3), ("times", 2), ("everything", 4), ("ends", 4), ("one", 0), ("revenue", None)],
)
def test_it_is_what_a_sort_gives(kind: str, passes: int | None) -> None:
    values = draw(kind)
    positions = [0, 1, 499, 500, 2500, 4000, 4998, 4999]
    got, took = found(values, positions)
    assert got == np.sort(values)[positions].tolist()
    assert passes is None or took == passes


@pytest.mark.parametrize("kind", ["ages", "ties", "everything"])
def test_it_does_not_depend_on_who_read_what(kind: str) -> None:
    values, positions = draw(kind), [500 * k for k in range(1, 10)]
    shuffled = np.random.default_rng(0).permutation(values)
    assert found(values, positions, parts=1) == found(shuffled, positions, parts=3)
