"""What was positive before: the items of each query in a split, and how often each item occurs.

Built by streaming into a folder of the cache, as arrays that ranks map into memory: rows are dealt to partitions on
disk by their query, and each partition is sorted by itself. Letters: n rows asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dist_rec.data.cached import built
from dist_rec.data.footers import FileFooter, content_key
from dist_rec.data.ids import PolicyCounts, Ragged, mix64, ragged_index
from dist_rec.data.scan import scan_columns
from dist_rec.data.schema import Schema

_FORMAT = 1
_PARTITION_ROWS = 2**22  # sorted in memory, about 200 MB at a time


class Positives:
    """The positives of one split.

    Args:
        schema: of the rows' own files, with an item table declared. query: the group that tells queries apart; None
            for item frequencies alone. footers: of the split. cache: the folder under which the store is kept.

    Rows of weight 0 are no positives.

    Attributes:
        frequency: (num_ids,) int64, the rows with each item.
    """

    def __init__(self, schema: Schema, query: str | None, footers: Sequence[FileFooter], cache: Path) -> None:
        narrow = _narrowed(schema, query)
        declared = hashlib.sha256(repr((_FORMAT, narrow)).encode()).hexdigest()[:16]
        build = partial(_build, narrow, footers)
        folder = built(cache / f"positives-{content_key(footers)}-{declared}", build)
        self.frequency = np.load(folder / "frequency.npy", mmap_mode="r")
        self._firsts = np.load(folder / "firsts.npy")
        self._queries, self._ends, self._items = (_mapped(folder / f"{n}.bin") for n in ("queries", "ends", "items"))

    def of(self, queries: np.ndarray) -> Ragged:
        """The items of each of (n,) queries, ascending; none for a query that the split does not have."""
        part = _partition(queries, len(self._firsts) - 1)
        starts, lengths = np.zeros(len(queries), np.int64), np.zeros(len(queries), np.int64)
        for number in np.unique(part):
            here = np.flatnonzero(part == number)
            low, high = self._firsts[number], self._firsts[number + 1]
            place = low + np.searchsorted(self._queries[low:high], queries[here])
            found = place < high
            found[found] = self._queries[place[found]] == queries[here][found]
            place, here = place[found], here[found]
            starts[here] = np.where(place > 0, self._ends[place - 1], 0)
            lengths[here] = self._ends[place] - starts[here]
        return Ragged(lengths, self._items[ragged_index(starts, lengths)], None)


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, np.int64, mode="r") if path.stat().st_size else np.empty(0, np.int64)


def _narrowed(schema: Schema, query: str | None) -> Schema:
    """The columns that say who had what: query, item and weight."""
    assert schema.items is not None
    item = schema.items.feature
    return replace(
        schema,
        labels={},
        dense={},
        sparse={item: schema.sparse[item]},
        groups={query: schema.groups[query]} if query is not None else {},
        items=None,
    )


def _partition(queries: np.ndarray, partitions: int) -> np.ndarray:
    return (mix64(queries.astype(np.uint64)) % np.uint64(partitions)).astype(np.int64)


def _build(schema: Schema, footers: Sequence[FileFooter], folder: Path) -> None:
    partitions = max(1, sum(sum(f.row_group_rows) for f in footers) // _PARTITION_ROWS)
    paths = [folder / f"part{number}.bin" for number in range(partitions)]
    frequency = np.zeros(next(iter(schema.sparse.values())).num_rows, np.int64)
    for columns, _ in scan_columns(footers, schema, PolicyCounts()):
        positive = columns.weights > 0
        items = columns.fixed[0][positive].astype(np.int64)
        seen, times = np.unique(items, return_counts=True)
        frequency[seen] += times
        for queries in columns.groups.values():
            pairs = np.stack([queries[positive], items], axis=1)
            part = _partition(pairs[:, 0], partitions)
            for number in np.unique(part):
                _append(paths[number], pairs[part == number])
    np.save(folder / "frequency.npy", frequency)
    _sort(paths, folder)


def _sort(paths: Sequence[Path], folder: Path) -> None:
    """Partition after partition: its queries ascending, each with its items ascending and once."""
    files = [folder / f"{name}.bin" for name in ("queries", "ends", "items")]
    for file in files:
        file.touch()
    firsts, total = [0], 0
    for path in paths:
        if path.exists():
            queries, counts, items = _grouped(np.fromfile(path, np.int64).reshape(-1, 2).T)
            for file, values in zip(files, (queries, total + np.cumsum(counts), items), strict=True):
                _append(file, values)
            total += len(items)
            firsts.append(firsts[-1] + len(queries))
            path.unlink()
        else:
            firsts.append(firsts[-1])
    np.save(folder / "firsts.npy", np.array(firsts))


def _grouped(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(2, n) queries and items -> distinct queries, items of each, and the items."""
    order = np.lexsort((pairs[1], pairs[0]))
    pairs = pairs[:, order]
    is_first = np.ones(len(order), bool)
    is_first[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)
    queries, counts = np.unique(pairs[0, is_first], return_counts=True)
    return queries, counts, pairs[1, is_first]


def _append(path: Path, values: np.ndarray) -> None:
    with open(path, "ab") as file:
        values.tofile(file)
