"""What the columns of Parquet files hold, measured: bounds from the footers' statistics, the rest from a sample.

`sampling` does the reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_rec.data.footers import FileFooter
from dist_rec.data.sampling import USABLE, Extent, Kind, affordable_rows, common_columns, read_extents, read_sample

_FEW_VALUES = 100  # columns with so few values are judged value by value in `separation`
_ROWS_PER_VALUE = 50  # mean rows per value at which the label's mean by value is no accident
_SKEWED = 2.0  # |skewness| of an exponential distribution, from which on a logarithm is worth it


@dataclass(frozen=True)
class Column:
    """One column. Counts are of the sample, unless said otherwise; items are the values inside lists.

    Attributes:
        type: the Arrow type in words. rows: sampled rows. values: values or items that are neither null nor NaN.
        nulls: rows that are null or NaN. null_items: items that are. infinite: values or items that are +-inf.
        total_nulls: null rows of all files by the footers; None for lists and where not recorded. NaN is not counted.
        low, high: bounds of the values, None without any (or for text). is_exact: they hold for all files.
        distinct: distinct values. estimate: distinct values of all training rows, estimated (`estimate_distinct`).
        mean_length, max_length: items per row, null rows as 0.
    """

    name: str
    kind: Kind
    type: str
    rows: int = 0
    values: int = 0
    nulls: int = 0
    null_items: int = 0
    infinite: int = 0
    total_nulls: int | None = None
    low: Any = None
    high: Any = None
    is_exact: bool = False
    distinct: int = 0
    estimate: int = 0
    mean_length: float = 1.0
    max_length: int = 1

    @property
    def has_nulls(self) -> bool:
        """Whether a row is known to be null or NaN, in the sample or by the footers."""
        return self.nulls > 0 or bool(self.total_nulls)

    @property
    def is_binary(self) -> bool:
        """Whether all that was seen is 0 and 1, both of them."""
        return self.kind in ("integer", "float", "bool") and self.distinct == 2 and (self.low, self.high) == (0, 1)


@dataclass(frozen=True)
class Profile:
    """All columns of a data set.

    Attributes:
        files, row_groups, rows: of the training files. columns: by name, in the order of the first file.
        unusable: column -> why it cannot be read, e.g. as it is not in every file.
        sample: (sampled rows) of the usable columns. is_whole: it has all training rows.
    """

    files: int
    row_groups: int
    rows: int
    columns: dict[str, Column]
    unusable: dict[str, str]
    sample: pa.Table
    is_whole: bool

    def same_lengths(self, a: str, b: str) -> bool:
        """Whether two list columns have as many items as each other in every sampled row."""
        return bool(np.array_equal(_lengths(_whole(self.sample.column(a))), _lengths(_whole(self.sample.column(b)))))

    def values(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Of a flat column: (sampled rows,) values, 0 where missing, and (sampled rows,) which are null or NaN."""
        return _numbers(_whole(self.sample.column(name)))

    def separation(self, name: str, label: str) -> float:
        """How well a flat column alone orders the rows by a binary label: max |AUC - 1/2|, 0.5 for a perfect leak.

        Tried are the value (nulls lowest), the value of rows that have one, and, where values are few and frequent,
        the mean label of each value. 0 if the label has one class only.
        """
        y, missing_label = self.values(label)
        x, missing = self.values(name)
        x, y, missing = x[~missing_label], y[~missing_label], missing[~missing_label]
        values, codes = np.unique(np.where(missing, -np.inf, x), return_inverse=True)
        scores = [(codes, y), (codes[~missing], y[~missing])]
        if len(values) <= min(_FEW_VALUES, len(y) // _ROWS_PER_VALUE):
            means = np.bincount(codes, y) / np.bincount(codes)
            scores.append((means[codes], y))
        return max(abs(_auc(score, target) - 0.5) for score, target in scores)

    def moments(self, name: str) -> Moments:
        """Transform, mean and standard deviation for a flat column with two values or more, from its finite values."""
        x, missing = self.values(name)
        x = x[~missing & np.isfinite(x)].astype(np.float64)
        logs = np.copysign(np.log1p(np.abs(x)), x)
        skewed = abs(_skewness(x)) > _SKEWED and abs(_skewness(logs)) < abs(_skewness(x)) / 2
        # values that are often negative are not counts (-1 may stand for a missing one)
        is_log = bool(skewed and (x.min() >= -1 or (x < 0).mean() <= 0.01))
        used = logs if is_log else x
        return Moments("log1p" if is_log else "none", float(used.mean()), float(used.std()))


class Moments(NamedTuple):
    """How to scale a dense column: mean and std are of the transformed values."""

    transform: Literal["none", "log1p"]
    mean: float
    std: float

    @property
    def neutral(self) -> float:
        """The value, in the file's units, that becomes 0: what to read a null as."""
        return math.copysign(math.expm1(abs(self.mean)), self.mean) if self.transform == "log1p" else self.mean


def profile(train: Sequence[FileFooter], sample_rows: int, others: Sequence[FileFooter] = ()) -> Profile:
    """The profile of the training files.

    sample_rows: about how many rows to read; with as many as there are, the sample is the whole.
    others: files of other splits: their footers count for bounds, nulls and types, their rows are not read.
    Raises DataError if a file cannot be read.
    """
    files = [*train, *others]
    kinds, unusable = common_columns(files)
    extents = read_extents(files)
    names = [name for name, kind in kinds.items() if kind in USABLE and name not in unusable]
    rows = sum(sum(footer.row_group_rows) for footer in train)
    sample = read_sample(train, names, affordable_rows(sample_rows, rows, [extents.get(name) for name in names]))
    is_whole = sample.num_rows == rows
    types = {field.name: str(field.type) for footer in files for field in footer.arrow_schema}
    columns = {name: Column(name, kind, types[name]) for name, kind in kinds.items()}
    for name in names:
        population = None if is_whole else rows
        columns[name] = _measure(columns[name], sample.column(name), extents.get(name), population, not others)
    row_groups = sum(len(footer.row_group_rows) for footer in train)
    return Profile(len(train), row_groups, rows, columns, unusable, sample, is_whole)


def _measure(
    column: Column, chunks: pa.ChunkedArray, extent: Extent | None, population: int | None, one_split: bool
) -> Column:
    """chunks: the sample, run by run. population: training rows, None if all were read. one_split: no other files."""
    array = values = _whole(chunks)
    lengths = np.ones(len(array), np.int64)
    if column.kind in ("integers", "floats"):
        lengths, values = _lengths(array), array.flatten()
    numbers, missing = _numbers(values)
    numbers = numbers[~missing]
    distinct = len(np.unique(numbers))
    facts = _bounds(numbers, extent, population is None and one_split)
    facts["estimate"] = distinct
    if population is not None:
        run_of_row = np.repeat(np.arange(chunks.num_chunks), [len(chunk) for chunk in chunks.chunks])
        runs = np.repeat(run_of_row, lengths)[~missing]
        facts["estimate"] = estimate_distinct(numbers, runs, population / len(array))
    if facts["is_exact"] and numbers.dtype.kind in "iu" and len(numbers):
        facts["estimate"] = min(facts["estimate"], facts["high"] - facts["low"] + 1)
    is_flat = values is array
    return replace(
        column,
        rows=len(array),
        values=len(numbers),
        nulls=int(missing.sum()) if is_flat else array.null_count,
        null_items=0 if is_flat else int(missing.sum()),
        infinite=_count_infinite(numbers),
        # of a list, the footers count empty ones as nulls
        total_nulls=extent.nulls if is_flat and extent is not None else None,
        distinct=distinct,
        mean_length=float(lengths.mean()),
        max_length=int(lengths.max()),
        **facts,
    )


def _count_infinite(numbers: np.ndarray) -> int:
    """How many are infinite in float32, as which they will be used."""
    with np.errstate(over="ignore"):
        return int(np.isinf(numbers.astype(np.float32)).sum()) if numbers.dtype.kind == "f" else 0


def _bounds(numbers: np.ndarray, extent: Extent | None, is_whole: bool) -> dict[str, Any]:
    if extent is not None and extent.is_exact and extent.low is not None:
        return {"low": extent.low, "high": extent.high, "is_exact": True}
    known = [numbers.min().item(), numbers.max().item()] if len(numbers) else []
    if extent is not None and extent.low is not None:
        known += [extent.low, extent.high]
    return {"low": min(known, default=None), "high": max(known, default=None), "is_exact": is_whole}


def estimate_distinct(values: np.ndarray, runs: np.ndarray, scale: float) -> int:
    """Distinct values of a population `scale` times as large as a sample, from the sample's (n,) values.

    runs: (n,) ascending numbers of the stretches of rows that were read together.

    Values seen once stand for sqrt(scale) values each, the guaranteed-error estimator of Charikar et al. 2000 (PODS,
    "Towards Estimation Error Guarantees for Distinct Values"): in expectation it is wrong by a factor of sqrt(scale)
    at most, if rows are drawn one by one. In files sorted by user, a user's rows lie in one stretch: what is seen
    several times but, beyond chance, in one stretch only stands for `scale` values.
    """
    distinct, first, counts = np.unique(values, return_index=True, return_counts=True)
    last = len(values) - 1 - np.unique(values[::-1], return_index=True)[1]
    once, several = counts == 1, counts > 1
    local = int((several & (runs[first] == runs[last])).sum())
    num_runs = len(np.unique(runs))
    local -= min(local, round(float((float(num_runs) ** (1.0 - counts[several])).sum())))
    total = len(distinct) - once.sum() - local + local * scale + once.sum() * math.sqrt(scale)
    return min(round(float(total)), round(len(values) * scale))


def _numbers(array: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(n,) values, 0 where missing (integers keep their type), and (n,) whether each is null or NaN."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    elif pa.types.is_float16(array.type):
        array = array.cast(pa.float32())
    missing = array.is_null(nan_is_null=pa.types.is_floating(array.type)).to_numpy(zero_copy_only=False)
    values = array.fill_null(0).to_numpy(zero_copy_only=False)
    return np.where(missing, values.dtype.type(0), values), missing


def _lengths(array: pa.Array) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _auc(score: np.ndarray, label: np.ndarray) -> float:
    """Share of (positive, negative) pairs in which the positive scores higher, ties half; 0.5 without pairs."""
    positive = label > 0
    ones, zeros = int(positive.sum()), int((~positive).sum())
    if min(ones, zeros) < _ROWS_PER_VALUE:
        return 0.5  # by accident a few rows can be in perfect order
    codes = np.unique(score, return_inverse=True)[1]
    ones_at, zeros_at = np.bincount(codes, positive), np.bincount(codes, ~positive)
    return float((ones_at * (np.cumsum(zeros_at) - zeros_at / 2)).sum() / (ones * zeros))


def _skewness(x: np.ndarray) -> float:
    deviation = x - x.mean()
    std = math.sqrt((deviation**2).mean())
    return float(((deviation / std) ** 3).mean()) if std > 0 else 0.0
