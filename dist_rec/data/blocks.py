"""Converted columns in file order -> batches in the order dealt.

Columns are blocked for many batches at once, so that one batch costs a few views and no copies. A batch therefore keeps
the arrays of its block alive, and nobody may write into it. Letters: n rows of a block, B rows per batch, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.data.batch import Batch
from dist_rec.data.ids import Ragged, ragged_index
from dist_rec.data.parquet import Columns, id_dtype, is_fixed
from dist_rec.data.schema import Schema

_TORCH = {np.dtype(t): torch.from_numpy(np.empty(0, t)).dtype for t in (np.float32, np.int32, np.int64)}
NO_GROUP = -1  # what the rows that only pad a batch have in every group
_TRANSPOSE_ROWS = 1024  # a tile of dense columns that stays in the cache while it is turned into rows


class BatchBuilder:
    """Makes the batches of one loader. pin: allocate page-locked memory at once, instead of copying into it later."""

    def __init__(self, schema: Schema, batch_size: int, pin: bool) -> None:
        self._schema = schema
        self._size = batch_size
        self._pin = pin
        self._keys = list(schema.sparse)
        self._all_fixed = all(is_fixed(column) for column in schema.sparse.values())
        self._scratch: dict[str, np.ndarray] = {}
        self._ones = self._lengths(batch_size)

    def batches(self, columns: Columns, rows: int, order: np.ndarray | None, num_batches: int) -> Iterator[Batch]:
        """`num_batches` batches of B rows: the first `rows` rows of `columns` in the order `order`, then padding.

        `columns` may be used again once the first batch is there: nothing refers to it any more.
        """
        padded = num_batches * self._size
        dense = self._dense(columns, rows, order, padded)
        labels = self._empty((padded, len(columns.labels)), np.float32)
        for i, label in enumerate(columns.labels):
            labels.numpy()[:, i] = _taken(label, rows, order, padded)
        weights = self._padded(columns.weights, rows, order, padded)
        if rows < padded:
            weights[rows:] = 0
        groups = {name: self._padded(group, rows, order, padded) for name, group in columns.groups.items()}
        for group in groups.values():
            group[rows:] = NO_GROUP
        sparse = self._fixed_only(columns, rows, order) if self._all_fixed else self._mixed(columns, rows, order)
        for i in range(num_batches):
            here = slice(i * self._size, (i + 1) * self._size)
            yield Batch(
                dense=dense[here],
                sparse=next(sparse),
                labels=labels[here],
                weights=weights[here],
                groups={name: group[here] for name, group in groups.items()},
            )

    def _dense(self, columns: Columns, rows: int, order: np.ndarray | None, padded: int) -> Tensor:
        result = self._empty((padded, len(columns.dense)), np.float32)
        out = result.numpy()
        out[rows:] = 0
        if not len(columns.dense):
            return result
        # turning into rows first and permuting whole rows is twice as fast as permuting column by column
        by_row = out if order is None else self._reused("dense", (rows, len(columns.dense)), np.float32)
        for start in range(0, rows, _TRANSPOSE_ROWS):
            stop = min(start + _TRANSPOSE_ROWS, rows)
            by_row[start:stop] = columns.dense[:, start:stop].T
        if order is not None:
            _take(by_row, order, out[:rows])
        return result

    def _padded(self, column: np.ndarray, rows: int, order: np.ndarray | None, padded: int) -> Tensor:
        result = self._empty((padded,), column.dtype)
        result.numpy()[:] = _taken(column, rows, order, padded)
        return result

    def _fixed_only(self, columns: Columns, rows: int, order: np.ndarray | None) -> Iterator[KeyedJaggedTensor]:
        """One id per row and feature: whole batches are views of one (batches, F, B) array."""
        whole, tail = divmod(rows, self._size)
        blocked = self._empty((whole, len(self._keys), self._size), columns.fixed.dtype)
        last = self._empty((len(self._keys), tail), columns.fixed.dtype)
        for i, column in enumerate(columns.fixed):
            taken = column[:rows]
            if order is not None:
                taken = _take(taken, order, self._reused("ids", (rows,), column.dtype))
            blocked.numpy()[:, i, :] = taken[: whole * self._size].reshape(whole, self._size)
            last.numpy()[i] = taken[whole * self._size :]
        return self._views(blocked, last)

    def _views(self, blocked: Tensor, last: Tensor) -> Iterator[KeyedJaggedTensor]:
        for values in blocked:
            yield self._kjt(values.view(-1), self._ones, [self._size] * len(self._keys))
        yield self._kjt(last.view(-1), self._lengths(last.shape[1]), [last.shape[1]] * len(last))
        while True:
            yield self._kjt(last.view(-1)[:0], self._lengths(0), [0] * len(last))

    def _lengths(self, rows: int) -> Tensor:
        """(F*B,) int32: one id in the first `rows` rows of each feature, none in the padding."""
        lengths = self._empty((len(self._schema.sparse), self._size), np.int32)
        lengths[:, :rows] = 1
        lengths[:, rows:] = 0
        return lengths.view(-1)

    def _mixed(self, columns: Columns, rows: int, order: np.ndarray | None) -> Iterator[KeyedJaggedTensor]:
        """Any number of ids per row: each batch is put together from a contiguous run of every feature."""
        fixed = iter(columns.fixed)
        ordered: list[Ragged] = []
        for name, column in self._schema.sparse.items():
            if is_fixed(column):
                ids = next(fixed)[:rows]
                ordered.append(Ragged(np.ones(rows, np.int64), ids.copy() if order is None else ids.take(order), None))
            else:
                ordered.append(_ordered(_joined(columns.ragged[name]), order))
        return self._runs(ordered, rows)

    def _runs(self, ordered: list[Ragged], rows: int) -> Iterator[KeyedJaggedTensor]:
        ends = [np.concatenate([[0], np.cumsum(bags.lengths)]) for bags in ordered]
        dtype, start = id_dtype(self._schema), 0
        while True:
            stop = min(start + self._size, rows)
            runs = [slice(int(end[start]), int(end[stop])) for end in ends]
            counts = [run.stop - run.start for run in runs]
            lengths = self._empty((len(ordered), self._size), np.int32)
            lengths[:, stop - start :] = 0
            values = self._empty((sum(counts),), dtype)
            weights = self._empty((sum(counts),), np.float32) if self._schema.is_weighted else None
            at = 0
            for i, (bags, run, count) in enumerate(zip(ordered, runs, counts, strict=True)):
                lengths.numpy()[i, : stop - start] = bags.lengths[start:stop]
                values.numpy()[at : at + count] = bags.values[run]
                if weights is not None:
                    weights.numpy()[at : at + count] = 1 if bags.weights is None else bags.weights[run]
                at += count
            yield self._kjt(values, lengths.view(-1), counts, weights)
            start = stop

    def _kjt(
        self, values: Tensor, lengths: Tensor, counts: list[int], weights: Tensor | None = None
    ) -> KeyedJaggedTensor:
        # with counts and stride given, TorchRec never has to fetch them back from a GPU
        return KeyedJaggedTensor(
            keys=self._keys,
            values=values,
            weights=weights,
            lengths=lengths,
            stride=self._size,
            length_per_key=counts,
            offset_per_key=list(accumulate(counts, initial=0)),
        )

    def _reused(self, name: str, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
        """An array for the time of one call, the same memory for each block: fresh memory costs page faults."""
        size = int(np.prod(shape))
        if name not in self._scratch or self._scratch[name].size < size:
            self._scratch[name] = np.empty(size, dtype)
        return self._scratch[name][:size].reshape(shape)

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype | type) -> Tensor:
        """Room for a batch or a block of them.

        Batches must be views of this very tensor, not of its numpy array: only through the tensor's storage does
        torch's pinned-memory allocator learn which copies still read it, before it hands the memory out again.
        """
        if not self._pin:
            return torch.from_numpy(np.empty(shape, dtype))
        return torch.empty(shape, dtype=_TORCH[np.dtype(dtype)], pin_memory=True)


def _take(source: np.ndarray, order: np.ndarray, out: np.ndarray) -> np.ndarray:
    """`source[order]` in `out`. Every index is in range, so any mode gives the same; this one is the fastest."""
    return np.take(source, order, axis=0, out=out, mode="wrap")


def _taken(column: np.ndarray, rows: int, order: np.ndarray | None, padded: int) -> np.ndarray:
    """(padded,) the column in the order dealt, 0 in the padding."""
    taken = column[:rows] if order is None else column[:rows].take(order)
    return taken if rows == padded else np.concatenate([taken, np.zeros(padded - rows, column.dtype)])


def _joined(parts: list[Ragged]) -> Ragged:
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Ragged(np.empty(0, np.int64), np.empty(0, np.int64), None)
    # a slice without weights cannot meet one with: both come from the same column
    weights = [part.weights for part in parts if part.weights is not None]
    return Ragged(
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.values for part in parts]),
        np.concatenate(weights) if weights else None,
    )


def _ordered(bags: Ragged, order: np.ndarray | None) -> Ragged:
    if order is None:
        return bags
    lengths = bags.lengths[order]
    index = ragged_index((np.cumsum(bags.lengths) - bags.lengths)[order], lengths)
    return Ragged(lengths, bags.values[index], bags.weights[index] if bags.weights is not None else None)
