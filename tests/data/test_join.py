"""Joined batches against the same data written out in full, and the policy for items that are not there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dist_rec.data.batch import Batch
from dist_rec.data.footers import DataError, check_columns, read_footers
from dist_rec.data.item_table import ItemTable
from dist_rec.data.join import ITEM, Join
from dist_rec.data.loader import DataConfig, Loader
from dist_rec.data.schema import Schema
from dist_rec.settings import parse
from tests import catalogues
from tests.runs import merged


def _schema(**changes: Any) -> Schema:
    complaints: list = []
    schema = parse(Schema, merged(catalogues.schema(), changes), complaints)
    assert [*complaints, *schema.check()] == []
    return schema


def _batches(schema: Schema, data, join: Join | None) -> tuple[list[Batch], Loader]:
    rows = schema.of_rows()
    footers = read_footers(str(data))
    check_columns(footers, rows)
    loader = Loader(
        DataConfig(train="", batch_size=32, shuffle_rows=64), rows, footers, rank=0, world_size=1, batch_size=32,
        seed=3, shuffle=True, epochs=1, join=join,
    )  # fmt: skip
    return list(loader), loader


def _written_out(interactions: pa.Table) -> pa.Table:
    """The interactions with the joined columns beside them."""
    items = {row["id"]: row for row in catalogues.items().to_pylist()}
    rows = interactions.to_pylist()
    for row in rows:
        own = items[row["item"]]
        row |= {"tags": own["tags"], "brand": own["brand"], "price": np.float32(own["price"])}
        row["history_brand"] = [items[i]["brand"] for i in row["history"]]
    table = pa.Table.from_pylist(rows)
    return table.set_column(table.schema.get_field_index("price"), "price", table["price"].cast(pa.float32()))


def test_a_joined_batch_is_the_batch_of_the_data_written_out(tmp_path):
    data = catalogues.write(tmp_path)
    schema = _schema()
    join = Join(schema, ItemTable(schema, read_footers(str(data / "items")), tmp_path / "cache"))
    joined, loader = _batches(schema, data / "train", join)
    assert loader.counts == {}
    pq.write_table(_written_out(catalogues.interactions(700)), tmp_path / "full.parquet", row_group_size=130)
    plain = {n: {**c, "join": None, "column": None} for n, c in catalogues.schema()["sparse"].items()}
    plain["history_brand"]["multi"] = True
    dense = {"price": {"join": None}}
    full, _ = _batches(_schema(items=None, sparse=plain, dense=dense), tmp_path / "full.parquet", None)
    assert len(joined) == len(full) == 22
    for one, two in zip(joined, full, strict=True):
        assert one.sparse.keys() == two.sparse.keys() == list(schema.sparse)
        assert one.sparse.length_per_key() == two.sparse.length_per_key()
        for name in ("values", "lengths"):
            assert torch.equal(getattr(one.sparse, name)(), getattr(two.sparse, name)()), name
            assert getattr(one.sparse, name)().dtype == getattr(two.sparse, name)().dtype
        assert torch.equal(one.dense, two.dense)
        assert torch.equal(one.weights, two.weights)
        items = torch.where(one.weights > 0, one.groups[ITEM], -1)
        assert torch.equal(items[: (items >= 0).sum()], two.sparse["item"].values().long())


def test_without_joined_columns_a_batch_only_gets_its_items(tmp_path):
    data = catalogues.write(tmp_path)
    kept = {n: c for n, c in catalogues.schema()["sparse"].items() if "join" not in c}
    schema = parse(Schema, {**catalogues.schema(), "sparse": kept, "dense": {}}, [])
    join = Join(schema, ItemTable(schema, read_footers(str(data / "items")), tmp_path / "cache"))
    with_items, _ = _batches(schema, data / "train", join)
    without, _ = _batches(schema, data / "train", None)
    for one, two in zip(with_items, without, strict=True):
        assert torch.equal(one.sparse.values(), two.sparse.values())
        assert set(one.groups) - set(two.groups) == {ITEM}


def test_an_item_that_is_not_there_stops_or_is_empty_and_counted(tmp_path):
    data = catalogues.write(tmp_path)
    rows = catalogues.interactions(40)
    item = rows["item"].to_numpy().copy()
    item[[4, 7]] = catalogues.ABSENT
    pq.write_table(rows.set_column(1, "item", pa.array(item)), tmp_path / "rows.parquet")

    def batches(policy: str) -> tuple[list[Batch], Loader]:
        schema = _schema(items={"on_missing": policy}, dense={"price": {"fill": 2.0}})
        table = ItemTable(schema, read_footers(str(data / "items")), tmp_path / "cache")
        return _batches(schema, tmp_path / "rows.parquet", Join(schema, table))

    with pytest.raises(DataError, match=r"feature 'item': item (3|50) is not in the item table .*on_missing: empty"):
        batches("error")
    found, loader = batches("empty")
    assert loader.counts == {"item.missing_item=empty": 2}
    seen = 0
    for batch in found:
        lengths = dict(zip(batch.sparse.keys(), batch.sparse.lengths().view(-1, 32), strict=True))
        missing = (lengths["item"] == 1) & (lengths["brand"] == 0)
        seen += int(missing.sum())
        assert (lengths["tags"][missing] == 0).all()
        torch.testing.assert_close(batch.dense[missing, 0], torch.full((int(missing.sum()),), (np.log(3) - 0.7) / 0.4))
    assert seen == 2


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        ({"items": None}, "sparse.tags.join", "needs an item table"),
        ({"items": {"feature": "itm"}}, "items.feature", "no sparse feature"),
        ({"items": {"feature": "history"}}, "items.feature", "a list"),
        ({"sparse": {"tags": {"join": "itm"}}}, "sparse.tags.join", "no sparse feature"),
        ({"sparse": {"tags": {"join": "brand"}}}, "sparse.tags.join", "joined itself"),
        ({"sparse": {"tags": {"join": "user"}}}, "sparse.tags.join", "num_ids 61, but the items have 97"),
        ({"sparse": {"item": {"out_of_range": "hash"}}}, "items.feature", "mixes items"),
        ({"sparse": {"item": {"on_null": "empty"}}}, "items.feature", "every row has an item"),
        ({"sparse": {"user": {"column": "u"}}}, "sparse.user.column", "goes with join"),
        ({"sparse": {"history_brand": {"multi": True}}}, "sparse.brand", "differently"),
        ({"sparse": {"brand": {"column": "id"}}}, "sparse.brand.column", "the item table's ids"),
        ({"dense": {"price": {"join": "history"}}}, "dense.price.join", "a list"),
    ],
)
def test_what_cannot_be_joined_is_a_complaint(change, key, words):
    schema = parse(Schema, merged(catalogues.schema(), change), [])
    found = {c.key: c.text for c in schema.check()}
    assert words in found[key], found
