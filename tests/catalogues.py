"""Small interactions and item tables, in Parquet, for the tests of retrieval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.runs import merged

USERS, ITEMS, TAGS, BRANDS = 61, 97, 43, 11
"""Valid ids; the item table has all items but `ABSENT`."""

ABSENT = (3, 50)

CORRELATION = {
    "id": {"tags": 2.0, "brand": 3.0},
    "tags": {"id": 2.0, "brand": 0.1},
    "brand": {"id": 3.0, "tags": 0.1},
}
"""For correlated masking: a matrix in the form of `dist-rec correlation`."""


def items(seed: int = 7) -> pa.Table:
    """One row per item, in no order: single- and multi-valued features and a number, with an item without tags."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation([i for i in range(ITEMS) if i not in ABSENT])
    lengths = np.where(ids == 10, 0, rng.integers(0, 5, len(ids)))
    return pa.table(
        {
            "id": ids,
            "tags": [rng.integers(0, TAGS, n).tolist() for n in lengths],
            "brand": rng.integers(0, BRANDS, len(ids)),
            "price": np.exp(rng.normal(size=len(ids))).astype("float32"),
        }
    )


def interactions(rows: int, seed: int = 5) -> pa.Table:
    """Rows of users who like items with their own number modulo 5, with the items they had before."""
    rng = np.random.default_rng(seed)
    present = np.array([i for i in range(ITEMS) if i not in ABSENT])
    user = rng.integers(0, USERS, rows)
    item = present[rng.integers(0, len(present), (rows, 4))]
    item = item[np.arange(rows), (item % 5 == (user % 5)[:, None]).argmax(axis=1)]
    return pa.table(
        {
            "user": user,
            "item": item,
            "history": [present[rng.integers(0, len(present), n)].tolist() for n in rng.integers(0, 4, rows)],
            "source": present[rng.integers(0, len(present), rows)],  # where the query is an item too
            "row": np.arange(rows),
        }
    )


def write(folder: Path, rows: int = 700, eval_rows: int = 90) -> Path:
    """train/, validation/ and test/ in uneven row groups, and items/ in two files."""
    for name, count, seed in (("train", rows, 5), ("validation", eval_rows, 6), ("test", eval_rows, 8)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(interactions(count, seed), folder / name / "a.parquet", row_group_size=130)
    (folder / "items").mkdir(exist_ok=True)
    pq.write_table(items().slice(0, 60), folder / "items" / "a.parquet", row_group_size=25)
    pq.write_table(items().slice(60), folder / "items" / "b.parquet")
    return folder


def schema() -> dict[str, Any]:
    """Users, their history and its brands on the query's side, the item and its features on the other."""
    items_table = {"num_ids": ITEMS, "table": "items"}
    return {
        "labels": {},
        "items": {"feature": "item", "id": "id"},
        "sparse": {
            "user": {"num_ids": USERS},
            "history": {**items_table, "multi": True, "mean_length": 1.5},
            "history_brand": {"num_ids": BRANDS, "join": "history", "column": "brand", "table": "brands"},
            "item": items_table,
            "tags": {"num_ids": TAGS, "multi": True, "mean_length": 2.0, "join": "item"},
            "brand": {"num_ids": BRANDS, "join": "item", "table": "brands"},
        },
        "dense": {"price": {"join": "item", "transform": "log1p", "mean": 0.7, "std": 0.4}},
        "groups": {"user": {"column": "user"}, "row": {"column": "row"}},
    }


def values(data: Path | str, folder: Path | str, /, **sections: Any) -> dict[str, Any]:
    """The mapping of a small retrieval run on `write`'s folder; `sections` are merged into it."""
    base = {
        "schema": schema(),
        "data": {
            "train": f"{data}/train",
            "validation": f"{data}/validation",
            "test": f"{data}/test",
            "items": f"{data}/items",
            "cache": f"{data}/cache",
            "batch_size": 16,
            "shuffle_rows": 100,
        },
        "model": {"name": "two_tower", "dim": 8, "layers": [16, 8]},
        "objective": {"name": "in_batch_softmax", "temperature": 0.2},
        "metrics": {"retrieval": {"k": [5, 20], "query": "user"}},
        "run": {"dir": str(folder), "device": "cpu"},
        "report": {"every": 5, "tensorboard": False},
    }
    return merged(base, sections)
