"""The catalogue: every item of the item table as rows that a model can encode. Letters: N items, n asked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dist_rec.data.bags import empty, packed
from dist_rec.data.batch import Batch
from dist_rec.data.ids import Ragged
from dist_rec.data.item_table import ItemTable
from dist_rec.data.parquet import id_dtype
from dist_rec.data.schema import Schema
from dist_rec.data.views import Views, view_keys


class Catalogue:
    """Items by their row in the item table.

    Attributes:
        schema: with an item table. table: its store. features: what an item alone decides, see `Schema.item_features`.
    """

    def __init__(self, schema: Schema, table: ItemTable) -> None:
        assert schema.items is not None
        self.schema, self.table = schema, table
        self.features = schema.item_features()
        self._dtype = id_dtype(schema)

    def __len__(self) -> int:
        return len(self.table)

    def bags(self, rows: np.ndarray) -> dict[str, Ragged]:
        """The bags of each of `features` for (n,) rows."""
        first, *joined = self.features
        sparse = self.schema.sparse
        own = Ragged(np.ones(len(rows), np.int32), self.table.ids[rows], None)
        return {first: own} | {name: self.table.bags(sparse[name].column or name, rows) for name in joined}

    def dense(self, rows: np.ndarray) -> Tensor:
        """(n, Nd) float32, zero in the columns that are not of the item."""
        assert self.schema.items is not None
        result = np.zeros((len(rows), len(self.schema.dense)), np.float32)
        for i, (name, column) in enumerate(self.schema.dense.items()):
            if column.join == self.schema.items.feature:
                result[:, i] = self.table.numbers(column.column or name, rows)
        return torch.from_numpy(result)

    def ids(self, rows: np.ndarray) -> Tensor:
        """(n,) int64: the id of the item in each row."""
        return torch.from_numpy(self.table.ids[rows].astype(np.int64))

    def share(self, rank: int, world_size: int) -> range:
        """The rows that fall to a rank: contiguous, equal up to one."""
        return range(len(self) * rank // world_size, len(self) * (rank + 1) // world_size)

    def batches(self, rank: int, world_size: int, batch_size: int, views: Views) -> Iterator[Batch]:
        """A rank's share in batches of B items: as many on every rank, the last ones padded with rows of weight 0.

        views: those whose keys the model's batches have; they are empty here, as is every feature not of the item.
        """
        mine, most = self.share(rank, world_size), -(-len(self) // world_size)
        for start in range(0, most, batch_size):
            rows = np.arange(mine.start + start, min(mine.start + start + batch_size, mine.stop))
            yield self._batch(rows, batch_size, views)

    def _batch(self, rows: np.ndarray, size: int, views: Views) -> Batch:
        found = {name: _padded(bags, size) for name, bags in self.bags(rows).items()}
        bags = {name: found.get(name, empty(size)) for name in (*self.schema.sparse, *view_keys(views))}
        dense = torch.zeros(size, len(self.schema.dense))
        dense[: len(rows)] = self.dense(rows)
        return Batch(
            dense=dense,
            sparse=packed(bags, self._dtype, self.schema.is_weighted),
            labels=torch.zeros(size, len(self.schema.labels)),
            weights=(torch.arange(size) < len(rows)).float(),
            groups={name: torch.full((size,), -1) for name in self.schema.groups},
            view_dense={view: torch.zeros(dense.shape) for view in views},
        )


def _padded(bags: Ragged, size: int) -> Ragged:
    return bags._replace(lengths=np.pad(bags.lengths, (0, size - len(bags.lengths))))
