"""The item table: a Parquet source with one row per item, built by streaming into arrays that ranks map into memory.

The store is a folder of the cache, named after the source's files and the columns' declarations. The ranks of a machine
share its pages; no process ever holds the catalogue. Letters: N items, n asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_rec.data.cached import built
from dist_rec.data.footers import DataError, FileFooter, content_key
from dist_rec.data.ids import PolicyCounts, Ragged, ragged_index
from dist_rec.data.parquet import Columns, Place, id_dtype, is_fixed
from dist_rec.data.scan import scan_columns
from dist_rec.data.schema import Schema

_FORMAT = 1
_NOTHING = np.empty(0, np.int64)


class _Bags(NamedTuple):
    """A multi-valued column: the values of row i are values[ends[i] : ends[i + 1]]."""

    ends: np.ndarray
    values: np.ndarray
    weights: np.ndarray | None


class ItemTable:
    """The features of every item, by its id or by its row in the item table.

    Args:
        schema: of the rows, with an item table declared. footers: of the item table, checked against
            `schema.of_items()`. cache: the folder under which the store is kept.

    Raises DataError for what a column's declaration forbids and for an id that occurs twice.

    Attributes:
        ids: (N,) the item of each row. counts: what the policies of the item table's columns did while it was built.
    """

    def __init__(self, schema: Schema, footers: Sequence[FileFooter], cache: Path) -> None:
        assert schema.items is not None
        self._schema, self.path = schema.of_items(), footers[0].path
        declared = repr((_FORMAT, self._schema.sparse, self._schema.dense))
        name = f"items-{content_key(footers)}-{hashlib.sha256(declared.encode()).hexdigest()[:16]}"
        folder = built(cache / name, partial(_build, schema.items.key, self._schema, footers))
        meta = json.loads((folder / "meta.json").read_text())
        self.counts = PolicyCounts(meta["counts"])
        self.ids = _mapped(folder / "ids.npy")
        self._place = _mapped(folder / "place.npy")
        self._fixed: dict[str, np.ndarray] = {}
        self._bags: dict[str, _Bags] = {}
        self._dense = {n: _mapped(folder / f"dense{i}.npy") for i, n in enumerate(self._schema.dense)}
        for i, (name, column) in enumerate(self._schema.sparse.items()):
            if name == schema.items.key:
                continue
            if is_fixed(column):
                self._fixed[name] = _mapped(folder / f"sparse{i}.npy")
            else:
                weights = folder / f"weights{i}.bin"
                self._bags[name] = _Bags(
                    ends=_mapped(folder / f"ends{i}.npy"),
                    values=_raw(folder / f"values{i}.bin", id_dtype(self._schema)),
                    weights=_raw(weights, np.dtype(np.float32)) if weights.exists() else None,
                )

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """ids: (n,) in 0 .. num_ids. Returns (n,) int64 rows; -1 for an item that is not in the table."""
        known = ids < len(self._place)  # the id of a reserved row is not
        return np.where(known, self._place[np.where(known, ids, 0)].astype(np.int64) - 1, -1)

    def bags(self, column: str, rows: np.ndarray) -> Ragged:
        """The ids in a sparse column of the item table for (n,) rows; none for row -1."""
        known = rows >= 0
        if column in self._fixed:
            return Ragged(known.astype(np.int64), self._fixed[column][rows[known]], None)
        bags, start = self._bags[column], np.where(known, rows, 0)
        first = bags.ends[start]
        lengths = np.where(known, bags.ends[start + 1] - first, 0)
        index = ragged_index(first, lengths)
        return Ragged(lengths, bags.values[index], None if bags.weights is None else bags.weights[index])

    def numbers(self, column: str, rows: np.ndarray) -> np.ndarray:
        """(n,) float32 of a dense column, transformed; 0 for row -1."""
        return np.where(rows >= 0, self._dense[column][rows], np.float32(0))


def _mapped(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def _raw(path: Path, dtype: np.dtype) -> np.ndarray:
    size = path.stat().st_size  # an empty file cannot be mapped
    return np.memmap(path, dtype, mode="r") if size else np.empty(0, dtype)


def _build(key: str, schema: Schema, footers: Sequence[FileFooter], folder: Path) -> None:
    """Writes the store, one row group in memory at a time."""
    writer, counts = _Writer(key, schema, footers, folder), PolicyCounts()
    for columns, place in scan_columns(footers, schema, counts):
        writer.add(columns, place)
    (folder / "meta.json").write_text(json.dumps({"counts": counts}))


class _Writer:
    """Open files of a store that is being built."""

    def __init__(self, key: str, schema: Schema, footers: Sequence[FileFooter], folder: Path) -> None:
        self._key, self._schema, self._at = key, schema, 0
        total = sum(sum(footer.row_group_rows) for footer in footers)

        def new(name: str, rows: int, dtype: Any) -> np.ndarray:
            return np.lib.format.open_memmap(folder / name, mode="w+", dtype=dtype, shape=(rows,))

        self._ids = new("ids.npy", total, np.int64)
        # row + 1, so that a file never written to says "not there"
        self._place = new("place.npy", schema.sparse[key].num_ids, np.int32 if total < 2**31 - 1 else np.int64)
        self._dense = [new(f"dense{i}.npy", total, np.float32) for i in range(len(schema.dense))]
        self._fixed: dict[str, np.ndarray] = {}
        self._ends: dict[str, np.ndarray] = {}
        self._files: dict[str, tuple[Path, Path]] = {}
        for i, (name, column) in enumerate(schema.sparse.items()):
            if name != key and is_fixed(column):
                self._fixed[name] = new(f"sparse{i}.npy", total, id_dtype(schema))
            elif name != key:
                self._ends[name] = new(f"ends{i}.npy", total + 1, np.int64)
                self._files[name] = folder / f"values{i}.bin", folder / f"weights{i}.bin"
                self._files[name][0].touch()

    def add(self, columns: Columns, place: Place) -> None:
        """The rows of one row group."""
        fixed = iter(columns.fixed)
        count = len(columns.weights)
        here = slice(self._at, self._at + count)
        for name, column in self._schema.sparse.items():
            if name == self._key:
                self._add_ids(next(fixed), here, place)
            elif is_fixed(column):
                self._fixed[name][here] = next(fixed)
            else:
                for bags in columns.ragged[name]:
                    self._add_bags(name, bags)
        for out, values in zip(self._dense, columns.dense, strict=True):
            out[here] = values
        self._at = here.stop

    def _add_ids(self, ids: np.ndarray, here: slice, place: Place) -> None:
        rows = np.arange(here.start, here.stop)
        taken = self._place[ids] > 0
        self._place[ids] = rows + 1
        # of an id that is here twice only the last row has stayed
        taken |= self._place[ids] != rows + 1
        if taken.any():
            i = int(np.argmax(taken))
            raise DataError(
                f"column '{self._key}' (ids of the item table): {ids[i]} is there more than once, at {place.locate(i)} "
                "and elsewhere; write one row per item"
            )
        self._ids[here] = ids

    def _add_bags(self, name: str, bags: Ragged) -> None:
        ends = self._ends[name]
        ends[self._at + 1 : self._at + 1 + len(bags.lengths)] = ends[self._at] + np.cumsum(bags.lengths)
        for path, values in zip(self._files[name], (bags.values, bags.weights), strict=True):
            if values is not None:
                with open(path, "ab") as file:
                    values.tofile(file)


def concatenated(bags: Ragged, groups: np.ndarray) -> Ragged:
    """Consecutive bags joined to one each. groups: (m,) how many bags make each of the m results."""
    ends = np.concatenate([[0], np.cumsum(bags.lengths)])
    stops = np.cumsum(groups)
    return bags._replace(lengths=ends[stops] - ends[stops - groups])
