"""A pass over groups alone reads every row once, whoever reads it, and says what is wrong with one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.data.footers import DataError, read_footers
from dist_rec.data.scan import scan_groups
from dist_rec.data.schema import GroupColumn, LabelColumn, Schema, SparseColumn, WeightColumn


@pytest.mark.parametrize("world_size", [1, 3, 20])
def test_every_row_with_weight_is_read_once(tmp_path, world_size):
    rows = 100
    table = pa.table({"row": np.arange(rows), "price": np.arange(rows) / 2, "w": np.arange(rows) % 3 - 0.0})
    pq.write_table(table.slice(0, 60), tmp_path / "a.parquet", row_group_size=13)
    pq.write_table(table.slice(60), tmp_path / "b.parquet", row_group_size=7)
    # the label and the sparse column are not in the files: they are not read
    schema = Schema(
        labels={"click": LabelColumn()},
        sparse={"user": SparseColumn(3)},
        weight=WeightColumn("w"),
        groups={"row": GroupColumn("row"), "price": GroupColumn("price", scale=2), "unused": GroupColumn("none")},
    )
    footers, found = read_footers(str(tmp_path)), []
    for rank in range(world_size):
        for chunk in scan_groups(footers, schema, ["row", "price"], rank, world_size):
            assert chunk["price"].tolist() == chunk["row"].tolist()
            found += chunk["row"].tolist()
    assert sorted(found) == [row for row in range(rows) if row % 3]


def test_a_bad_value_is_named(tmp_path):
    pq.write_table(pa.table({"row": [1, 2, 3, None]}), tmp_path / "a.parquet", row_group_size=2)
    schema = Schema(labels={}, sparse={}, groups={"g": GroupColumn("row")})
    with pytest.raises(DataError, match=r"group 'g'\): null or NaN at row 3 of .*row group 1"):
        list(scan_groups(read_footers(str(tmp_path)), schema, ["g"], 0, 1))
