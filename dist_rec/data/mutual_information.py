"""Mutual information of the columns of a table of items, streaming, in memory that does not grow with the table.

Definition, for columns with any number of values per row: a row that has values A and B in two columns spreads its
weight evenly over the pairs, P(a, b) = mean over rows of 1[a in A, b in B] / (|A| |B|). Rows where either is empty are
left out. For single values this is the usual joint distribution.

Values are counted in at most V buckets per column: by themselves where they are 0 .. V-1, hashed otherwise.

With few rows per cell the plain estimate is far too high: 1,000 x 1,000 independent values seem to share 3.9 nats in
20,000 rows. What independent columns with the same distributions would seem to share, E, is taken off as in the
adjusted mutual information (Vinh, Epps, Bailey 2010, JMLR 11), and the result is brought back to nats:
I = M (I_plain - E) / (M - E), with M = min(H(a), H(b)), the most two columns can share. So it is 0 without a relation
and M for a function. E is that of counts that are Poisson, but for the margins being given; a row with several values
counts as its pairs do, by their geometric mean.

The ids of the items need no estimate. They determine everything else: I(id, f) = H(f) - mean of log |values of f|.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_rec.data.footers import FileFooter
from dist_rec.data.ids import PolicyCounts, Ragged, hash_ids, ragged_index
from dist_rec.data.scan import scan_columns
from dist_rec.data.schema import Schema, SparseColumn

_MOST_BUCKETS = 2048
_MOST_CELLS = 2**26  # of all pairs of columns together, 512 MiB
_PAIRS_AT_A_TIME = 2**22
_ANY_ID = 2**62


@dataclass(frozen=True)
class Information:
    """What was found.

    Attributes:
        information: column -> other column -> nats. entropy: column -> H of its buckets, in nats.
        plug_in: as `information`, not adjusted.
        buckets: V. hashed: the columns whose values are hashed. rows: of the table.
    """

    information: dict[str, dict[str, float]]
    plug_in: dict[str, dict[str, float]]
    entropy: dict[str, float]
    buckets: int
    hashed: list[str]
    rows: int


def mutual_information(footers: Sequence[FileFooter], key: str, columns: dict[str, bool]) -> Information:
    """Of every pair of `columns` and of each with the ids in column `key`. Reads the files twice.

    columns: name -> whether it is a list.
    """
    rows = sum(sum(footer.row_group_rows) for footer in footers)
    names, pairs = list(columns), list(itertools.combinations(columns, 2))
    buckets = int(min(_MOST_BUCKETS, (_MOST_CELLS / max(len(pairs), 1)) ** 0.5))
    hashed = [name for name, (low, high) in _ranges(footers, columns).items() if low < 0 or high >= buckets]
    joint = {pair: _Table(buckets, buckets) for pair in pairs}
    # with one column beside it in a single bucket, a table is the column's own distribution
    alone = {name: _Table(buckets, 1) for name in names}
    log_lengths = dict.fromkeys(names, 0.0)
    for bags in _bags(footers, columns):
        counted = {
            n: b._replace(values=hash_ids(b.values, buckets) if n in hashed else b.values) for n, b in bags.items()
        }
        for name, own in counted.items():
            one = own._replace(
                lengths=(own.lengths > 0).astype(np.int64), values=np.zeros((own.lengths > 0).sum(), int)
            )
            alone[name].add(own, one)
            log_lengths[name] += float(np.log(own.lengths[own.lengths > 0]).sum())
        for (a, b), table in joint.items():
            table.add(counted[a], counted[b])
    entropy = {name: table.entropy() for name, table in alone.items()}
    corrected: dict[str, dict[str, float]] = {name: {} for name in (key, *names)}
    plug_in: dict[str, dict[str, float]] = {name: {} for name in (key, *names)}
    for name in names:
        known = max(entropy[name] - log_lengths[name] / max(alone[name].rows, 1), 0.0)
        for found in (corrected, plug_in):
            found[key][name] = found[name][key] = known
    for (a, b), table in joint.items():
        plug_in[a][b] = plug_in[b][a] = table.information()
        most = min(entropy[a], entropy[b])
        corrected[a][b] = corrected[b][a] = _adjusted(table.information(), table.expected(), most)
    return Information(corrected, plug_in, entropy, buckets, hashed, rows)


class _Table:
    """The joint distribution of two columns, as sums of weights."""

    def __init__(self, rows: int, columns: int) -> None:
        self._weights = np.zeros((rows, columns))
        self._log_pairs = 0.0  # sum over rows
        self.rows = 0

    def add(self, one: Ragged, other: Ragged) -> None:
        """The bags of the same rows in both columns; every pair of values of a row counts alike, all of them 1."""
        pairs = one.lengths * other.lengths
        self.rows += int(np.count_nonzero(pairs))
        self._log_pairs += float(np.log(pairs[pairs > 0]).sum())
        starts = [np.cumsum(bags.lengths) - bags.lengths for bags in (one, other)]
        ends = np.cumsum(pairs)
        at = 0
        while at < len(pairs):
            reached = ends[at - 1] if at else 0
            stop = max(at + 1, int(np.searchsorted(ends, reached + _PAIRS_AT_A_TIME, side="right")))
            here, count = slice(at, stop), pairs[at:stop]
            place = ragged_index(np.zeros(len(count), np.int64), count)
            width = np.repeat(other.lengths[here], count)
            a = one.values[np.repeat(starts[0][here], count) + place // np.maximum(width, 1)]
            b = other.values[np.repeat(starts[1][here], count) + place % np.maximum(width, 1)]
            shape = self._weights.shape
            cells = np.bincount(a * shape[1] + b, np.repeat(1 / np.maximum(count, 1), count), shape[0] * shape[1])
            self._weights += cells.reshape(shape)
            at = stop

    def information(self) -> float:
        """The plug-in estimate in nats; never below 0."""
        p = self._weights / max(self._weights.sum(), 1)
        used = p > 0
        product = p.sum(axis=1, keepdims=True) * p.sum(axis=0, keepdims=True)
        return max(float((p[used] * np.log(p[used] / product[used])).sum()), 0.0)

    def expected(self) -> float:
        """What `information` would be on average if the columns had nothing to do with each other."""
        if not self.rows:
            return 0.0
        n = self.rows * math.exp(self._log_pairs / self.rows)
        p = self._weights / self._weights.sum()
        rows, columns = p.sum(axis=1), p.sum(axis=0)
        return sum(float(_excess(row, columns[columns > 0], n).sum()) for row in rows[rows > 0]) / n

    def entropy(self) -> float:
        """Of the first column, in nats."""
        p = self._weights.sum(axis=1) / max(self._weights.sum(), 1)
        return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def _adjusted(information: float, expected: float, most: float) -> float:
    if most <= expected:  # so few rows that nothing can be told
        return 0.0
    return most * max(information - expected, 0.0) / (most - expected)


@functools.cache
def _excess_table() -> tuple[np.ndarray, np.ndarray]:
    """x = log of means, and the mean of N log(N / mean) for N ~ Poisson(mean) divided by mean."""
    x = np.linspace(np.log(1e-12), np.log(500), 2000)
    count = np.arange(1, 800)
    log_factorial = np.cumsum(np.log(count))
    mean = np.exp(x)[:, None]
    chance = np.exp(count * x[:, None] - mean - log_factorial)
    return x, (chance * count * (np.log(count) - x[:, None])).sum(axis=1) / mean[:, 0]


def _excess(row: float, columns: np.ndarray, n: float) -> np.ndarray:
    """The mean of N log(N / m) for the count N of a cell with mean m = n * row * column: about 1/2 for large m."""
    x, ratio = _excess_table()
    mean = n * row * columns
    found = np.where(mean > 500, 0.5, mean * np.interp(np.log(np.maximum(mean, 1e-12)), x, ratio))
    # the margins are given, which leaves counts a little less room: exact for small and for large means
    return found - (row + columns - row * columns) * mean * np.log(2) / (1 + 2 * np.log(2) * mean)


def _bags(footers: Sequence[FileFooter], columns: dict[str, bool]) -> itertools.chain[dict[str, Ragged]]:
    """The values of every column, one row group after the other; nulls are no values."""
    sparse = {
        n: SparseColumn(_ANY_ID, multi=multi, on_null="empty", out_of_range="hash") for n, multi in columns.items()
    }
    schema = Schema(labels={}, sparse=sparse)
    groups = scan_columns(footers, schema, PolicyCounts())
    return itertools.chain({n: parts[0] for n, parts in group.ragged.items()} for group, _ in groups)


def _ranges(footers: Sequence[FileFooter], columns: dict[str, bool]) -> dict[str, tuple[int, int]]:
    """Smallest and largest value of each column."""
    found = dict.fromkeys(columns, (0, 0))
    for bags in _bags(footers, columns):
        for name, own in bags.items():
            if len(own.values):
                low, high = found[name]
                found[name] = min(low, int(own.values.min())), max(high, int(own.values.max()))
    return found
