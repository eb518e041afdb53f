"""The item table: what it holds against the rows it was built from, what it refuses, and how much memory it takes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.data.catalogue import Catalogue
from dist_rec.data.footers import DataError, check_columns, read_footers
from dist_rec.data.item_table import ItemTable
from dist_rec.data.schema import Schema
from dist_rec.settings import parse
from tests import catalogues


@pytest.fixture
def schema() -> Schema:
    complaints: list = []
    found = parse(Schema, catalogues.schema(), complaints)
    assert not complaints
    assert list(found.check()) == []
    return found


def _open(schema: Schema, path: Path, cache: Path) -> ItemTable:
    footers = read_footers(str(path))
    check_columns(footers, schema.of_items())
    return ItemTable(schema, footers, cache)


def test_it_holds_every_item_once_whatever_the_order_of_the_rows(schema, tmp_path):
    data = catalogues.write(tmp_path)
    table = _open(schema, data / "items", tmp_path / "cache")
    truth = {row["id"]: row for row in catalogues.items().to_pylist()}
    assert sorted(table.ids.tolist()) == sorted(truth)
    ids = np.random.default_rng(0).integers(0, catalogues.ITEMS + 1, 300)  # ITEMS itself would be a reserved row
    rows = table.rows(ids)
    assert [row >= 0 for row in rows] == [int(i) in truth for i in ids]
    tags, brand, price = table.bags("tags", rows), table.bags("brand", rows), table.numbers("price", rows)
    starts = np.cumsum(tags.lengths) - tags.lengths
    brands = iter(brand.values.tolist())
    for n, i in enumerate(ids):
        item = truth.get(int(i), {"tags": [], "price": None})
        assert tags.values[starts[n] : starts[n] + tags.lengths[n]].tolist() == item["tags"]
        assert brand.lengths[n] == ("brand" in item)
        if "brand" in item:
            assert next(brands) == item["brand"]
            assert price[n] == pytest.approx((np.log1p(item["price"]) - 0.7) / 0.4, rel=1e-5)
        else:
            assert price[n] == 0


def test_a_changed_file_is_another_store_and_an_unchanged_one_is_kept(schema, tmp_path):
    data, cache = catalogues.write(tmp_path), tmp_path / "cache"
    first = _open(schema, data / "items", cache)
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")}
    _open(schema, data / "items", cache)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.npy")} == kept
    pq.write_table(catalogues.items(seed=8).slice(0, 60), data / "items" / "a.parquet")
    changed = catalogues.items(seed=8)
    pq.write_table(changed.slice(60), data / "items" / "b.parquet")
    assert _open(schema, data / "items", cache).ids.tolist() == changed["id"].to_pylist() != first.ids.tolist()


def test_an_item_twice_and_an_id_out_of_range_are_named(schema, tmp_path):
    table = catalogues.items()
    pq.write_table(pa.concat_tables([table, table.slice(5, 1)]), tmp_path / "twice.parquet", row_group_size=40)
    with pytest.raises(DataError, match=rf"{table['id'][5]} is there more than once, at row .*write one row per item"):
        _open(schema, tmp_path / "twice.parquet", tmp_path / "cache")
    pq.write_table(table.set_column(0, "id", pa.array([catalogues.ITEMS] * len(table))), tmp_path / "far.parquet")
    with pytest.raises(DataError, match=r"column 'id' .*is outside 0\.\.96"):
        _open(schema, tmp_path / "far.parquet", tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()], "a store that failed was left behind"


def test_a_missing_column_of_the_item_table_is_named(schema, tmp_path):
    pq.write_table(catalogues.items().drop_columns(["brand"]), tmp_path / "items.parquet")
    with pytest.raises(DataError, match=r"column 'brand' .* is missing"):
        _open(schema, tmp_path / "items.parquet", tmp_path / "cache")


def test_building_takes_the_memory_of_a_row_group_and_not_of_the_catalogue(tmp_path):
    count, row_group = 400_000, 10_000
    table = pa.table({"item": np.arange(count), "tags": pa.array(np.arange(count * 8).reshape(count, 8).tolist())})
    table = table.set_column(1, "tags", table["tags"].cast(pa.list_(pa.int64())))
    pq.write_table(table, tmp_path / "items.parquet", row_group_size=row_group)
    sparse = {"item": {"num_ids": count}, "tags": {"num_ids": count * 8, "multi": True, "join": "item"}}
    schema = parse(Schema, {"labels": {}, "sparse": sparse, "items": {"feature": "item"}}, [])
    footers = read_footers(str(tmp_path / "items.parquet"))
    tracemalloc.start()
    ItemTable(schema, footers, tmp_path / "cache")
    _, peak = tracemalloc.get_traced_memory()  # numpy reports its arrays; maps of files are not memory of the process
    tracemalloc.stop()
    whole = count * 8 * 4
    assert peak < whole / 4, f"{peak:,} bytes for a catalogue of {whole:,}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 200])
def test_the_catalogue_comes_to_the_ranks_once_and_in_equal_numbers_of_batches(schema, tmp_path, world_size):
    data = catalogues.write(tmp_path)
    catalogue = Catalogue(schema, _open(schema, data / "items", tmp_path / "cache"))
    seen, counts = [], set()
    for rank in range(world_size):
        batches = list(catalogue.batches(rank, world_size, 16, {"a": ["item", "tags"]}))
        counts.add(len(batches))
        for batch in batches:
            assert batch.sparse.keys() == [*schema.sparse, "item#a", "tags#a"]
            assert batch.sparse["user"].values().numel() == batch.sparse["tags#a"].values().numel() == 0
            seen += batch.sparse["item"].values().tolist()
            assert int((batch.weights > 0).sum()) == batch.sparse["item"].values().numel()
    assert len(counts) == 1
    assert seen == catalogue.table.ids.tolist()
