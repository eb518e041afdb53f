"""Ids of sparse columns: Arrow buffers -> numpy, with the schema's policies for what is null or out of range.

Everything is vectorised over one slice of one row group; n is its number of rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dist_rec.data.footers import DataError
from dist_rec.data.schema import SparseColumn

PolicyCounts = Counter[str]
"""How often each policy other than "error" was used: "column.what=policy" -> values. Counters add up with +."""

Locate = Callable[[int], str]
"""Row of the slice -> where it lies, in words."""


def describe_policies(counts: Mapping[str, int]) -> str:
    """Policy counts in one sentence."""
    listing = ", ".join(f"{key} {count:,}" for key, count in sorted(counts.items()))
    return f"values that a column's policy replaced or dropped: {listing}"


class Ragged(NamedTuple):
    """Ids of n rows. lengths: (n,) int64. values: (sum of lengths,). weights: (sum of lengths,) float32, or None."""

    lengths: np.ndarray
    values: np.ndarray
    weights: np.ndarray | None


class Ids(NamedTuple):
    """How the ids of one sparse column are judged, counted and located."""

    name: str
    column: SparseColumn
    counts: PolicyCounts
    locate: Locate

    def fixed(self, array: pa.Array) -> np.ndarray:
        """(n,) integers in 0 .. num_rows-1: one id per row, where no policy can drop one."""
        values, nulls = primitive(array)
        if nulls is None:
            return self.in_range(values, _same)
        replacement = self._null_id(nulls, _same, "null")
        ids = self.in_range(np.where(nulls, values.dtype.type(0), values), _same)
        return np.where(nulls, np.int64(replacement), ids.astype(np.int64, copy=False))

    def optional(self, array: pa.Array) -> Ragged:
        """One id per row, none where it is null."""
        values, nulls = primitive(array)
        if nulls is None:
            return Ragged(np.ones(len(values), np.int64), self.in_range(values, _same), None)
        self._count("null", "empty", nulls)
        rows = np.flatnonzero(~nulls)
        return Ragged((~nulls).astype(np.int64), self.in_range(values[rows], lambda i: int(rows[i])), None)

    def lists(self, array: pa.Array, weight_array: pa.Array | None) -> Ragged:
        """A list of ids per row, with the weights in `weight_array` if there is one."""
        starts, lengths, null_rows = _list_bounds(array)
        weight_starts = self._matching(weight_array, lengths) if weight_array is not None else starts
        lengths = self._truncated(lengths)
        values, nulls = primitive(array.values)
        index = _gather_index(starts, lengths)
        values, nulls = values[index], nulls[index] if nulls is not None else None
        weights = None
        if weight_array is not None:
            weights = self._weights(weight_array.values, _gather_index(weight_starts, lengths), lengths)
        bags = self._judged(lengths, values, nulls, weights)
        return bags if null_rows is None else self._with_null_rows(bags, null_rows)

    def in_range(self, values: np.ndarray, row_of: Callable[[int], int]) -> np.ndarray:
        """`values` with those outside 0 .. num_ids-1 treated by the policy. row_of: index of a value -> its row."""
        size, policy = self.column.num_ids, self.column.out_of_range
        if not len(values) or _all_below(values, size):
            return values
        bad = (values < 0) | (values >= size)
        if policy == "error":
            i = int(np.argmax(bad))
            raise DataError(
                f"{self._who()}: id {values[i]} is outside 0..{size - 1} at {self.locate(row_of(i))}; raise num_ids "
                "above it, or set out_of_range to modulo, hash or reserved"
            )
        self._count("out_of_range", policy, bad)
        wide = values if values.dtype == np.uint64 else values.astype(np.int64)
        if policy == "reserved":
            return np.where(bad, wide.dtype.type(size), wide)
        mapped = wide % wide.dtype.type(size) if policy == "modulo" else hash_ids(wide, size)
        return mapped if bad.all() else np.where(bad, mapped.astype(np.int64), wide.astype(np.int64))

    def _judged(
        self, lengths: np.ndarray, values: np.ndarray, nulls: np.ndarray | None, weights: np.ndarray | None
    ) -> Ragged:
        """Policies for the ids inside lists."""
        row_of = _row_of(lengths)
        if nulls is None or not nulls.any():
            return Ragged(lengths, self.in_range(values, row_of), weights)
        if self.column.on_null == "empty":
            self._count("null_in_list", "empty", nulls)
            rows = np.repeat(np.arange(len(lengths)), lengths)[~nulls]
            kept = weights[~nulls] if weights is not None else None
            lengths = np.bincount(rows, minlength=len(lengths))
            return Ragged(lengths, self.in_range(values[~nulls], lambda i: int(rows[i])), kept)
        replacement = self._null_id(nulls, row_of, "null_in_list")
        ids = self.in_range(np.where(nulls, values.dtype.type(0), values), row_of)
        return Ragged(lengths, np.where(nulls, np.int64(replacement), ids.astype(np.int64, copy=False)), weights)

    def _with_null_rows(self, bags: Ragged, null_rows: np.ndarray) -> Ragged:
        """A row without a list at all: as a null id, so an empty bag or a bag of one."""
        if self.column.on_null == "empty":
            self._count("null", "empty", null_rows)
            return bags
        replacement = self._null_id(null_rows, _same, "null")
        at = (np.cumsum(bags.lengths) - bags.lengths)[null_rows]
        values = np.insert(bags.values.astype(np.int64, copy=False), at, replacement)
        weights = np.insert(bags.weights, at, np.float32(1)) if bags.weights is not None else None
        return Ragged(np.where(null_rows, 1, bags.lengths), values, weights)

    def _null_id(self, nulls: np.ndarray, row_of: Callable[[int], int], what: str) -> int:
        """The id that nulls are read as."""
        policy = self.column.on_null
        if policy == "error":
            row = self.locate(row_of(int(np.argmax(nulls))))
            raise DataError(
                f"{self._who()}: {what.replace('_', ' ')} at {row}; set on_null to fill, empty or reserved, or write "
                "the file without nulls"
            )
        self._count(what, policy, nulls)
        return self.column.fill if policy == "fill" else self.column.num_ids

    def _truncated(self, lengths: np.ndarray) -> np.ndarray:
        most = self.column.max_length
        if most is None or not len(lengths) or lengths.max() <= most:
            return lengths
        kept = np.minimum(lengths, most)
        self.counts[f"{self.name}.max_length=dropped"] += int(lengths.sum() - kept.sum())
        return kept

    def _matching(self, weight_array: pa.Array, lengths: np.ndarray) -> np.ndarray:
        """Where each row's weights start; DataError unless there is one for each id."""
        starts, weight_lengths, _ = _list_bounds(weight_array)
        if not np.array_equal(lengths, weight_lengths):
            i = int(np.argmax(lengths != weight_lengths))
            raise DataError(
                f"{self._who()}: {lengths[i]} ids but {weight_lengths[i]} weights in '{self.column.weights}' at "
                f"{self.locate(i)}; write one weight for each id"
            )
        return starts

    def _weights(self, array: pa.Array, index: np.ndarray | slice, lengths: np.ndarray) -> np.ndarray:
        values, nulls = primitive(array)
        weights = values[index].astype(np.float32)
        good = np.isfinite(weights) if nulls is None else np.isfinite(weights) & ~nulls[index]
        if not good.all():
            i = int(np.argmin(good))
            found = "null" if nulls is not None and nulls[index][i] else weights[i]
            raise DataError(
                f"column '{self.column.weights}' (weights of '{self.name}'): {found} at "
                f"{self.locate(_row_of(lengths)(i))}; every id needs a finite weight"
            )
        return weights

    def _count(self, what: str, policy: str, where: np.ndarray) -> None:
        self.counts[f"{self.name}.{what}={policy}"] += int(np.count_nonzero(where))

    def _who(self) -> str:
        table = self.column.table or self.name
        return f"column '{self.name}' (sparse, table '{table}' of {self.column.num_ids} ids)"


def primitive(array: pa.Array) -> tuple[np.ndarray, np.ndarray | None]:
    """Values of a number or bool column, arbitrary where null, without a copy; and which are null, None if none is."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    if array.null_count == 0:
        return array.to_numpy(zero_copy_only=True), None
    bare = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], offset=array.offset)
    return bare.to_numpy(zero_copy_only=True), array.is_null().to_numpy(zero_copy_only=False)


def mix64(x: np.ndarray) -> np.ndarray:
    """(n,) uint64, mixed in place by the finaliser of splitmix64 (Steele et al. 2014): each bit depends on all bits."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def hash_ids(values: np.ndarray, size: int) -> np.ndarray:
    """(n,) int64 in 0..size-1: `mix64` of the 64 bits of each value, then mod size."""
    return (mix64(values.astype(np.uint64)) % np.uint64(size)).astype(np.int64)  # a copy is mixed


def _all_below(values: np.ndarray, size: int) -> bool:
    """Whether all values are in 0..size-1."""
    if values.dtype.kind == "i" and size <= np.iinfo(values.dtype).max:
        # read as unsigned, a negative value is larger than any size: one pass instead of two
        return bool(values.view(values.dtype.str.replace("i", "u")).max() < size)
    return bool(values.min() >= 0 and values.max() < size)


def _list_bounds(array: pa.Array) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(n,) start of each row in `array.values`, (n,) length, 0 where null, and which rows are null, None if none is."""
    offsets = array.offsets.to_numpy().astype(np.int64)
    lengths = np.diff(offsets)
    if array.null_count == 0:
        return offsets[:-1], lengths, None
    nulls = array.is_null().to_numpy(zero_copy_only=False)
    return offsets[:-1], np.where(nulls, 0, lengths), nulls


def _gather_index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray | slice:
    """Index of the values of all rows, one row after the other; a slice where they lie end to end already."""
    if not len(starts):
        return slice(0, 0)
    if np.array_equal(starts[1:], starts[:-1] + lengths[:-1]):
        return slice(int(starts[0]), int(starts[-1] + lengths[-1]))
    return ragged_index(starts, lengths)


def ragged_index(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(sum of lengths,): starts[0], starts[0] + 1, .. lengths[0] of them, then those of the next row, and so on."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def _row_of(lengths: np.ndarray) -> Callable[[int], int]:
    return lambda i: int(np.searchsorted(np.cumsum(lengths), i, side="right"))


def _same(i: int) -> int:
    return i
