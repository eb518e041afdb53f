"""Passes over rows in file order, a row group at a time: no batches, no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dist_rec.data.footers import FileFooter, open_file
from dist_rec.data.ids import PolicyCounts
from dist_rec.data.parquet import Columns, Place, convert, decode
from dist_rec.data.schema import Schema


def scan_groups(
    footers: Sequence[FileFooter], schema: Schema, names: Sequence[str], rank: int, world_size: int
) -> Iterator[dict[str, NDArray[np.int64]]]:
    """Chunks of this rank's rows, a row group each: group name -> (n,) int64, of rows with weight > 0.

    Every W-th row group is rank r's, so all ranks together read every row once. Memory: the named columns of a row
    group.

    Raises DataError for a value that its column's declaration forbids.
    """
    only = Schema(labels={}, sparse={}, weight=schema.weight, groups={name: schema.groups[name] for name in names})
    row_groups = [(footer, i) for footer in footers for i in range(len(footer.row_group_rows))]
    for footer, i in row_groups[rank::world_size]:
        rows, first = footer.row_group_rows[i], sum(footer.row_group_rows[:i])
        with open_file(footer.path) as file:
            table = decode(file, footer.path, i, rows, only, at_once="://" in footer.path)
        columns = Columns.empty(only, rows)
        convert(table, only, columns, 0, PolicyCounts(), Place(footer.path, i, first, slice(0, rows)))
        real = columns.weights > 0
        yield columns.groups if real.all() else {name: values[real] for name, values in columns.groups.items()}


def scan_columns(
    footers: Sequence[FileFooter], schema: Schema, counts: PolicyCounts
) -> Iterator[tuple[Columns, Place]]:
    """Every row once: the converted columns of each row group that has rows, and where they lie.

    Memory is that of one row group. counts: gets what the policies other than "error" did.
    """
    for footer in footers:
        first = 0
        with open_file(footer.path) as file:
            for i, rows in enumerate(footer.row_group_rows):
                if rows:
                    columns, place = Columns.empty(schema, rows), Place(footer.path, i, first, slice(0, rows))
                    table = decode(file, footer.path, i, rows, schema, at_once="://" in footer.path)
                    convert(table, schema, columns, 0, counts, place)
                    yield columns, place
                first += rows
