"""Which two cohorts a model's predictions differ most between: counts of each cohort, and the choice.

Cohorts are the cells of one axis, or of two axes together. Of each, rows and positive rows are counted, and how often
the predicted log-odds fall into each of some bins: integers, so that counts of many ranks add up exactly. Letters: B
rows of a batch, C cohorts, n bins.

Source: C2AL, arXiv 2510.02215, cohort discovery; the minimum mass and the minimum of positives are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_rec.data.cohorts import Axis
from dist_rec.metrics.axes import CutAxis
from dist_rec.metrics.divergence import divergence_matrix


@dataclass(frozen=True)
class Bins:
    """`count` bins of equal width from `low` to `high`; what lies beyond falls into the first or the last."""

    low: float
    high: float
    count: int

    @property
    def width(self) -> float:
        """Of each bin."""
        return (self.high - self.low) / self.count

    @property
    def centres(self) -> NDArray[np.float64]:
        """(n,) the middle of each bin."""
        return np.asarray(self.low + (np.arange(self.count) + 0.5) * self.width, np.float64)

    def numbers(self, values: Tensor) -> Tensor:
        """(B,) finite values -> (B,) int64, the number of each one's bin."""
        return ((values.double() - self.low) / self.width).clamp(0, self.count - 1).long()


class Tally:
    """Counts of the cohorts of one axis or of a pair of axes; takes 8 (n + 1) bytes for each cohort, on `device`.

    Attributes:
        counts: (C, n + 1) int64; in the first n columns the rows of each bin, in the last one the positive rows.
    """

    def __init__(self, axes: Sequence[CutAxis], bins: Bins, device: torch.device) -> None:
        self.axes, self.bins = tuple(axes), bins
        cohorts = prod(len(axis.cells) for axis in axes)
        self.counts = torch.zeros((cohorts, bins.count + 1), dtype=torch.int64, device=device)

    def add(self, logits: Tensor, labels: Tensor, weights: Tensor, groups: Mapping[str, Tensor]) -> None:
        """One batch; all (B,). Rows of weight 0 do not count; the others count once, whatever their weight."""
        number = torch.zeros_like(weights, dtype=torch.int64)
        for axis in self.axes:
            number = number * len(axis.cells) + axis.numbers(groups[axis.axis.name])
        start, real = number * self.counts.shape[1], (weights > 0).long()
        flat = self.counts.view(-1)
        flat.index_add_(0, start + self.bins.numbers(logits), real)
        flat.index_add_(0, start + self.bins.count, real * (labels > 0))


@dataclass(frozen=True)
class Cohort:
    """One cohort and what was counted of it.

    Attributes:
        cells: the cell on each axis, by the axis' name. name: the same in words.
        histogram: (n,) rows by predicted log-odds. mean: of the log-odds, as the bins tell it.
    """

    cells: dict[str, int]
    name: str
    rows: int
    positives: int
    histogram: NDArray[np.int64]
    mean: float


@dataclass(frozen=True)
class Division:
    """All rows divided along one axis or a pair.

    Attributes:
        axes: one or two. cohorts: those that reach the minimums, C of them, in the order of their cells.
        others: those that have rows but do not. matrix: (C, C) divergence of each column's cohort from each row's.
    """

    axes: tuple[Axis, ...]
    cohorts: list[Cohort]
    others: list[Cohort]
    matrix: NDArray[np.float64]

    @property
    def best(self) -> tuple[float, int, int] | None:
        """(divergence, number of the head, number of the tail) of the most different pair; None if there is no pair.

        A measure that is not symmetric counts as the mean of both directions. Of equal pairs the one with more rows
        wins, then the one with lower cells. The head is the one with the higher mean of predicted log-odds.
        """
        if len(self.cohorts) < 2:
            return None
        i, j = min(combinations(range(len(self.cohorts)), 2), key=lambda pair: self._rank(*pair))
        a, b = self.cohorts[i], self.cohorts[j]
        is_higher = (a.mean, [*a.cells.values()]) > (b.mean, [*b.cells.values()])
        return -self._rank(i, j)[0], *((i, j) if is_higher else (j, i))

    def _rank(self, i: int, j: int) -> tuple[float, int, Any, Any]:
        a, b = self.cohorts[i], self.cohorts[j]
        cells = sorted([tuple(a.cells.values()), tuple(b.cells.values())])
        return -(self.matrix[i, j] + self.matrix[j, i]) / 2, -a.rows - b.rows, *cells


def divide(
    axes: Sequence[CutAxis],
    counts: NDArray[np.int64],
    bins: Bins,
    measure: str,
    *,
    min_rows: float,
    min_positives: int,
) -> Division:
    """From a `Tally`'s counts of all ranks, (C, n + 1), to the cohorts and their divergences.

    min_rows, min_positives: what a cohort must have to be looked at.
    """
    kept: list[Cohort] = []
    others: list[Cohort] = []
    for number in np.flatnonzero(counts[:, :-1].sum(axis=1)):
        cohort = _cohort(axes, int(number), counts[number], bins)
        (kept if cohort.rows >= min_rows and cohort.positives >= min_positives else others).append(cohort)
    matrix = divergence_matrix([cohort.histogram for cohort in kept], measure, bins.width)
    return Division(tuple(axis.axis for axis in axes), kept, others, matrix)


def _cohort(axes: Sequence[CutAxis], number: int, counts: NDArray[np.int64], bins: Bins) -> Cohort:
    cells: dict[str, int] = {}
    words: list[str] = []
    for axis in reversed(axes):
        number, inside = divmod(number, len(axis.cells))
        cell = axis.cells[inside]
        cells = {axis.axis.name: cell, **cells}
        words.insert(0, axis.describe(cell))
    histogram, rows = counts[:-1], int(counts[:-1].sum())
    mean = float(histogram @ bins.centres / rows)
    return Cohort(cells, ", ".join(words), rows, int(counts[-1]), histogram, mean)


@dataclass(frozen=True)
class Choice:
    """The pair that differs most, of all divisions; divergence: of the two, see `Division.best`."""

    division: Division
    divergence: float
    head: Cohort
    tail: Cohort


def choose(divisions: Sequence[Division]) -> Choice | None:
    """The most different pair; of equal ones that of the first division; None if no division has two cohorts."""
    found: Choice | None = None
    for division in divisions:
        best = division.best
        if best is not None and (found is None or best[0] > found.divergence):
            found = Choice(division, best[0], division.cohorts[best[1]], division.cohorts[best[2]])
    return found


def to_mapping(choice: Choice, divisions: Sequence[Division], bins: Bins, measure: str) -> dict[str, Any]:
    """What `cohorts.json` says of a choice: first what `data.cohorts.read` needs, then the evidence for it.

    Divergences have 6 significant digits. "mass" and "rate" are shares of all rows, "base_rate" a share of its own.
    """
    every = [*choice.division.cohorts, *choice.division.others]
    rows = sum(cohort.rows for cohort in every)
    axes = choice.division.axes
    return {
        "axes": [axis.name for axis in axes],
        "edges": {axis.name: None if axis.edges is None else list(axis.edges) for axis in axes},
        "head": choice.head.cells,
        "tail": choice.tail.cells,
        "head_rate": choice.head.positives / rows,
        "tail_rate": choice.tail.positives / rows,
        "head_mass": choice.head.rows / rows,
        "tail_mass": choice.tail.rows / rows,
        "rows": rows,
        "positives": sum(cohort.positives for cohort in every),
        "cohorts": [_facts(cohort, rows) for cohort in choice.division.cohorts],
        "divergence": {
            "measure": measure,
            "of_head_and_tail": _rounded(choice.divergence),
            "matrix": [[_rounded(value) for value in row] for row in choice.division.matrix.tolist()],
        },
        "histograms": {
            "low": bins.low,
            "high": bins.high,
            "all": sum(cohort.histogram for cohort in every).tolist(),  # type: ignore[union-attr]
            "head": choice.head.histogram.tolist(),
            "tail": choice.tail.histogram.tolist(),
        },
        "searched": [_summary(division) for division in divisions],
    }


def _facts(cohort: Cohort, rows: int) -> dict[str, Any]:
    return {
        "name": cohort.name,
        "cells": cohort.cells,
        "rows": cohort.rows,
        "positives": cohort.positives,
        "mass": cohort.rows / rows,
        "base_rate": cohort.positives / cohort.rows,
        "mean_log_odds": _rounded(cohort.mean),
    }


def _summary(division: Division) -> dict[str, Any]:
    best = division.best
    return {
        "axes": [axis.name for axis in division.axes],
        "cohorts": len(division.cohorts),
        "below_minimums": len(division.others),
        "divergence": None if best is None else _rounded(best[0]),
        "head": None if best is None else division.cohorts[best[1]].name,
        "tail": None if best is None else division.cohorts[best[2]].name,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
