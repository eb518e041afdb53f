"""Positives by query against a dictionary, for one and for many partitions."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.data import positives
from dist_rec.data.footers import read_footers
from dist_rec.data.schema import Schema, WeightColumn
from dist_rec.settings import parse
from tests import catalogues


@pytest.mark.parametrize("partition_rows", [2**22, 40])
def test_they_are_those_of_the_rows_with_weight(tmp_path, monkeypatch, partition_rows):
    monkeypatch.setattr(positives, "_PARTITION_ROWS", partition_rows)
    rng = np.random.default_rng(1)
    rows = catalogues.interactions(700)
    # any integers may be queries, and the same pair may come twice
    rows = rows.set_column(0, "user", pa.array(rows["user"].to_numpy() * 10**15 - 7 * 10**15))
    rows = pa.concat_tables([rows, rows.slice(0, 50)])
    weight = (rng.random(750) > 0.2).astype("float32")
    pq.write_table(rows.append_column("w", pa.array(weight)), tmp_path / "rows.parquet", row_group_size=130)
    schema = parse(Schema, catalogues.schema(), []).of_rows()
    schema.weight = WeightColumn("w")
    found = positives.Positives(schema, "user", read_footers(str(tmp_path / "rows.parquet")), tmp_path / "cache")
    truth, frequency = defaultdict(set), np.zeros(catalogues.ITEMS, int)
    for user, item, w in zip(rows["user"].to_pylist(), rows["item"].to_pylist(), weight, strict=True):
        if w:
            truth[user].add(item)
            frequency[item] += 1
    assert found.frequency.tolist() == frequency.tolist()
    queries = np.array([*truth, 12345, -(10**16), *list(truth)[:3]])
    bags = found.of(queries)
    parts = np.split(bags.values, np.cumsum(bags.lengths)[:-1])
    assert [p.tolist() for p in parts] == [sorted(truth.get(q, ())) for q in queries.tolist()]
    assert sum(map(len, truth.values())) < int(frequency.sum()), (
        "no pair came twice, so the test says less than it could"
    )


def test_without_queries_there_are_frequencies_alone(tmp_path):
    pq.write_table(catalogues.interactions(70), tmp_path / "rows.parquet")
    schema = parse(Schema, catalogues.schema(), []).of_rows()
    found = positives.Positives(schema, None, read_footers(str(tmp_path / "rows.parquet")), tmp_path / "cache")
    assert found.frequency.sum() == 70
    assert found.of(np.array([1, 2])).lengths.tolist() == [0, 0]
