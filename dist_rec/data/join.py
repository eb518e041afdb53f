"""Batches of rows -> batches with the columns joined from the item table. Letters: B rows, Nd dense columns."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch

from dist_rec.data.bags import packed, unpacked
from dist_rec.data.batch import Batch
from dist_rec.data.footers import DataError
from dist_rec.data.ids import PolicyCounts, Ragged
from dist_rec.data.item_table import ItemTable, concatenated
from dist_rec.data.parquet import Numbers, id_dtype
from dist_rec.data.schema import DenseColumn, Schema

ITEM = "#item"
"""Group with the item of each row, (B,) int64, -1 where a row only pads the batch."""


class Join:
    """Adds the joined columns of `schema` and the group `ITEM` to batches that hold the rows' own columns.

    It keeps nothing between batches.

    Args:
        wanted: the features and dense columns to be there afterwards, by default all; the batches then are of
            `schema.of_rows(wanted)`. Dense columns that are not wanted are 0, as models count them by their place.
    """

    def __init__(self, schema: Schema, table: ItemTable, wanted: Collection[str] | None = None) -> None:
        assert schema.items is not None
        self._schema, self._table, self._item = schema, table, schema.items.feature
        self._dtype = id_dtype(schema)
        self._sparse = {n: c for n, c in schema.sparse.items() if wanted is None or n in wanted}
        dense = {n: c for n, c in schema.dense.items() if wanted is None or n in wanted}
        self._by = {c.join for c in self._sparse.values() if c.join}
        self._by |= {c.join for c in dense.values() if c.join}
        self._dense_names = list(schema.of_rows(wanted).dense)
        self._fill = {name: _filled(column) for name, column in dense.items() if column.join}

    def __call__(self, batch: Batch, counts: PolicyCounts) -> Batch:
        """counts: gets how many items were missing, if the schema lets them be.

        Raises DataError for an item that the item table does not have, if it does not.
        """
        own = unpacked(batch.sparse)
        rows = {name: self._rows(name, own[name], counts) for name in sorted(self._by)}
        bags = {
            name: own[name] if c.join is None else self._bags(c.column or name, own[c.join], rows[c.join])
            for name, c in self._sparse.items()
        }
        item = {ITEM: _one_each(own[self._item])} if self._item in own else {}
        return replace(
            batch,
            sparse=packed(bags, self._dtype, self._schema.is_weighted),
            dense=batch.dense if self._dense_names == list(self._schema.dense) else self._dense(batch, own, rows),
            groups={**batch.groups, **item},
        )

    def _rows(self, feature: str, bags: Ragged, counts: PolicyCounts) -> np.ndarray:
        """The row of the item table of each id of the feature."""
        assert self._schema.items is not None
        rows = self._table.rows(bags.values)
        missing = rows < 0
        if missing.any():
            if self._schema.items.on_missing == "error":
                item = bags.values[int(np.argmax(missing))]
                raise DataError(
                    f"feature '{feature}': item {item} is not in the item table (data.items, {self._table.path}, "
                    f"column '{self._schema.items.key}'); add it there, or set schema.items.on_missing: empty"
                )
            counts[f"{feature}.missing_item=empty"] += int(np.count_nonzero(missing))
        return rows

    def _bags(self, column: str, ids: Ragged, rows: np.ndarray) -> Ragged:
        """The joined ids of each of the B rows: those of all its items, one after the other."""
        return concatenated(self._table.bags(column, rows), ids.lengths)

    def _dense(self, batch: Batch, own: dict[str, Ragged], rows: dict[str, np.ndarray]) -> torch.Tensor:
        result = np.zeros((len(batch.weights), len(self._schema.dense)), np.float32)
        given = dict(zip(self._dense_names, batch.dense.numpy().T, strict=True))
        for i, (name, column) in enumerate(self._schema.dense.items()):
            if name in given:
                result[:, i] = given[name]
            if name not in self._fill:
                continue
            assert column.join is not None
            here = own[column.join].lengths > 0
            found = self._table.numbers(column.column or name, rows[column.join])
            # a row without an item has the fill too; one that only pads the batch has 0 like every dense column
            result[:, i] = np.where(batch.weights.numpy() > 0, self._fill[name], np.float32(0))
            result[here, i] = np.where(rows[column.join] >= 0, found, self._fill[name])
        return torch.from_numpy(result)


def _one_each(ids: Ragged) -> torch.Tensor:
    """(B,) int64 the one id of each bag, -1 where it has none."""
    result = np.full(len(ids.lengths), -1, np.int64)
    result[ids.lengths > 0] = ids.values
    return torch.from_numpy(result)


def _filled(column: DenseColumn) -> np.float32:
    """The column's `fill`, transformed and standardised as its values are."""
    out = np.empty(1, np.float32)
    Numbers("fill", "dense", PolicyCounts(), str).dense(pa.array([column.fill], pa.float64()), column, out)
    return out[0]
