"""The data of the retrieval study as interactions and item tables, and the two baselines that learn nothing.

Amazon Beauty and Toys (S3-Rec): a user's last item is test, the one before validation, all others train; a row has the
user, the items before it (newest first) and the item. An item's attributes are split into brand and categories: an
attribute that is the first of some item's list and never at another place is a brand.

MUSAE squirrel: a row is a link from page src to page dst; `linked` has the other pages that the train and validation
links lead to, for exclusion and for item-kNN alone. Pages have nouns and a decile of their traffic.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_rec.metrics.retrieval import RetrievalMetrics, frequency_slices, report

SPLITS = ("train", "validation", "test")
SAMPLE_SEED = 20261123
ROW_GROUP_ROWS = 16384
_BLOCK = 512  # queries scored at a time


class DataSet(NamedTuple):
    """Where a set lies in the data folder, and its columns. reference: the data README's R@10 and R@50 on test."""

    interactions: str
    items: str
    query: str
    item: str
    seen: str  # the list column with what a query had before
    reference: dict[str, tuple[float, float]]


def _amazon(name: str, **reference: tuple[float, float]) -> DataSet:
    files = (f"s3rec_amazon/{name}_interactions.parquet", f"s3rec_amazon/{name}_items.parquet")
    return DataSet(*files, "user_id", "item_id", "history", reference)


SETS = {
    "beauty": _amazon("beauty", popularity=(0.012, 0.034), item_knn=(0.066, 0.130), two_tower=(0.028, 0.083)),
    "toys": _amazon("toys", popularity=(0.011, 0.028), item_knn=(0.079, 0.147), two_tower=(0.030, 0.088)),
    "squirrel": DataSet(
        "musae_wiki/squirrel_links.parquet", "musae_wiki/squirrel_pages.parquet", "src", "dst", "linked",
        {"popularity": (0.255, 0.336), "item_knn": (0.612, 0.699), "two_tower": (0.645, 0.819)},
    ),
}  # fmt: skip


def prepare(name: str, data: Path, folder: Path, share: float) -> Path:
    """Writes the splits and items.parquet under `folder`, which it returns. share: of the rows of train that are kept.

    Validation, test, histories and exclusions stay those of all the data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, split = (_links if name == "squirrel" else _sequences)(pq.read_table(data / SETS[name].interactions))
    for number, split_name in enumerate(SPLITS):
        here = np.flatnonzero(split == number)
        if split_name == "train" and share < 1:
            here = np.sort(np.random.default_rng(SAMPLE_SEED).permutation(here)[: round(share * len(here))])
        pq.write_table(rows.take(here), folder / f"{split_name}.parquet", row_group_size=ROW_GROUP_ROWS)
    items = pq.read_table(data / SETS[name].items)
    items = _pages(items) if name == "squirrel" else _products(items)
    pq.write_table(items, folder / "items.parquet", row_group_size=ROW_GROUP_ROWS)
    return folder


def _sequences(table: pa.Table) -> tuple[pa.Table, np.ndarray]:
    columns = [table[name].to_numpy() for name in ("user_id", "item_id", "pos", "split")]
    order = np.lexsort((columns[2], columns[0]))
    user, item, place, split = (column[order] for column in columns)
    rows = np.arange(len(user))

    def before(most: int) -> pa.Array:
        """The `most` items before each row's, the newest first."""
        lengths = np.minimum(place, most)
        ends = np.cumsum(lengths)
        age = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
        values = item[np.repeat(rows, lengths) - 1 - age]
        return pa.ListArray.from_arrays(np.concatenate([[0], ends]).astype(np.int32), values)

    lists = {"history": before(int(place.max())), "recent": before(2)}
    return pa.table({"user_id": user, "item_id": item, **lists}), split


def _products(table: pa.Table) -> pa.Table:
    attributes = table["attributes"].to_pylist()
    elsewhere = {value for values in attributes for value in values[1:]}
    brands = [values[0] if values and values[0] not in elsewhere else 0 for values in attributes]
    categories = [[v for v in values if v != brand] for values, brand in zip(attributes, brands, strict=True)]
    return pa.table({"item_id": table["item_id"], "brand": brands, "categories": categories})


def _links(table: pa.Table) -> tuple[pa.Table, np.ndarray]:
    src, dst, split = (table[name].to_numpy() for name in ("src", "dst", "split"))
    known: dict[int, list[list[int]]] = {}
    for s, d, number in zip(src.tolist(), dst.tolist(), split.tolist(), strict=True):
        known.setdefault(s, [[], [], []])[number].append(d)
    # what came before: nothing that a row of train could give itself away by
    linked = [
        known[s][0] + (known[s][1] if number == 2 else []) if number else []
        for s, number in zip(src.tolist(), split.tolist(), strict=True)
    ]
    return pa.table({"src": src, "dst": dst, "linked": pa.array(linked, pa.list_(pa.int64()))}), split


def _pages(table: pa.Table) -> pa.Table:
    traffic = table["log10_traffic"].to_numpy()
    decile = np.searchsorted(np.quantile(traffic, np.arange(0.1, 1, 0.1)), traffic)
    return pa.table({"dst": table["page_id"], "nouns": table["nouns"], "traffic": decile})


class Evaluated(NamedTuple):
    """Metrics of a baseline, named as `dist-rec evaluate` names them."""

    metrics: dict[str, float]


def baselines(name: str, folder: Path, config: RetrievalMetrics) -> dict[str, Evaluated]:
    """Popularity, and item-kNN: an item scores the cosines of its column of train with those of what the query had."""
    which = SETS[name]
    train, test = (pq.read_table(folder / f"{split}.parquet") for split in ("train", "test"))
    catalogue = pq.read_table(folder / "items.parquet")[which.item].to_numpy()
    size = int(catalogue.max()) + 1
    frequency = np.bincount(train[which.item].to_numpy(), minlength=size)
    known = np.isin(np.arange(size), catalogue)
    slices = frequency_slices(frequency, catalogue, config.head)
    popularity = np.broadcast_to(frequency.astype(np.float32), (_BLOCK, size))
    near = _cosines(train[which.query].to_numpy(), train[which.item].to_numpy(), size)
    found: dict[str, list[np.ndarray]] = {"popularity": [], "item_knn": []}
    query, item = test[which.query].to_numpy(), test[which.item].to_numpy()
    for seen, target in _blocks(test[which.seen].to_pylist(), item):
        scores = {"popularity": popularity[: len(target)].copy()}
        scores["item_knn"] = np.stack([near[s].sum(axis=0) if s else np.zeros(size, np.float32) for s in seen])
        for baseline, values in scores.items():
            values[:, ~known] = -np.inf
            for row, items in enumerate(seen):
                values[row, [i for i in items if i != target[row]]] = -np.inf
            found[baseline].append(_places(values, target, max(config.k)))
    return {
        baseline: Evaluated(report([query, item, np.concatenate(places), slices[item]], config))
        for baseline, places in found.items()
    }


def _cosines(query: np.ndarray, item: np.ndarray, size: int) -> np.ndarray:
    """(size, size) float32 cosines of the items' columns in the matrix of queries by items, 0 on the diagonal."""
    order = np.argsort(query, kind="stable")
    groups = np.split(item[order], np.flatnonzero(np.diff(query[order])) + 1)
    together = np.zeros((size, size), np.float32)
    for items in groups:
        unique = np.unique(items)
        together[np.ix_(unique, unique)] += 1
    norms = np.sqrt(np.maximum(np.diagonal(together), 1))
    together /= norms[:, None] * norms
    np.fill_diagonal(together, 0)
    return together


def _blocks(seen: list[list[int]], item: np.ndarray) -> Iterator[tuple[list[list[int]], np.ndarray]]:
    for start in range(0, len(item), _BLOCK):
        yield seen[start : start + _BLOCK], item[start : start + _BLOCK]


def _places(scores: np.ndarray, target: np.ndarray, most: int) -> np.ndarray:
    """(n,) place of each target in its list, from 1; 0 beyond `most`. Equal scores stand in the order of the ids."""
    own = scores[np.arange(len(target)), target][:, None]
    ahead = (scores > own).sum(axis=1) + ((scores == own) & (np.arange(scores.shape[1]) < target[:, None])).sum(axis=1)
    return np.where(ahead < most, ahead + 1, 0)
