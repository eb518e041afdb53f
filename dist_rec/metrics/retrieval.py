"""Quality of ranked lists: recall, mean average precision, NDCG and reciprocal rank, overall and by slice.

A query is a group of rows with the same query number; its relevant items are those rows' items. Letters: n rows, R
relevant items of a query, K length of the list that is judged.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dist_rec.data.schema import Schema
from dist_rec.settings import Complaint

INTERVAL = "ci"
"""Last part of the name of a half-width of a 95 % confidence interval."""

SLICES = ("head", "tail", "unseen")
_log = logging.getLogger(__name__)
_Z95 = 1.959963984540054
_KINDS = ("recall", "map", "ndcg")


@dataclass
class RetrievalMetrics:
    """What `metrics.retrieval` takes."""

    k: list[int] = field(default_factory=lambda: [10, 50])  # lengths of the lists
    # a group that tells queries apart (a user, a source item): its rows of a split are one query with several relevant
    # items, and its positives of earlier splits (for test: train and validation) are left out of its list. What the
    # query's side reads and excludes must be the same in all of them, else each row has a list of its own. Empty: every
    # row is a query, and nothing is left out
    query: str | None = None
    # sparse features, such as a history, whose ids are left out of the row's list too: those that the model reads. Of a
    # list that the feature's max_length cuts, the items beyond it stay
    exclude: list[str] = field(default_factory=list)
    head: float = 0.1  # share of the catalogue, the most frequent items of train, that is the slice "head"
    block: int = 8192  # items that are scored at a time; speed only, as the scores in memory are bounded

    def names(self) -> list[str]:
        """The metrics of all rows together, in the order of the reports."""
        names = [f"{kind}@{k}" for k in self.k for kind in _KINDS] + ["mrr"]
        return names + [f"{name}/{INTERVAL}" for name in names]

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `metrics.retrieval`."""
        if not self.k or min(self.k) < 1 or len(set(self.k)) < len(self.k):
            yield Complaint("k", f"is {self.k}; give the lengths of lists, each once and at least 1")
        if self.query is not None and self.query not in schema.groups:
            known = ", ".join(schema.groups) or "none"
            yield Complaint("query", f"is '{self.query}', which is no group of the schema; known: {known}")
        for name in self.exclude:
            if schema.items is None or name not in schema.sparse:
                yield Complaint(
                    "exclude", f"names '{name}', which is no sparse feature with items; known: {_items(schema)}"
                )
            elif schema.sparse[name].num_ids != schema.sparse[schema.items.feature].num_ids:
                yield Complaint("exclude", f"names '{name}', which holds no ids of items; known: {_items(schema)}")
        if not 0 < self.head < 1:
            yield Complaint("head", f"is {self.head}; the share of the items that counts as head is between 0 and 1")
        if self.block < 1:
            yield Complaint("block", f"is {self.block}; score at least one item at a time")


def _items(schema: Schema) -> str:
    """The features that hold ids of items, in words."""
    if schema.items is None or schema.items.feature not in schema.sparse:
        return "none, as schema.items declares no item"
    count = schema.sparse[schema.items.feature].num_ids
    return ", ".join(name for name, column in schema.sparse.items() if column.num_ids == count)


def is_retrieval(name: str) -> bool:
    """Whether a metric's name is one of these."""
    return name == "mrr" or name.partition("@")[0] in _KINDS


def measures(
    query: NDArray[np.int64], item: NDArray[np.int64], rank: NDArray[np.int64], ks: list[int]
) -> dict[str, tuple[float, float]]:
    """Each metric's mean over queries and the half-width of its 95 % interval (normal); nan without queries.

    Recall@K is hits / min(K, R), so that a full list can reach 1; with one relevant item a query it is the hit rate.
    MAP@K is the mean of (1 / min(K, R)) * sum of the precision at each hit. NDCG@K has gain 1 per relevant item. MRR
    is 1 / rank of the first relevant item, 0 beyond the longest list.

    Args:
        query, item: (n,). A pair that occurs twice counts once, at its best place. rank: (n,) place of the item in its
            query's list, from 1; 0 if it is not in the longest list. All rows of a query should be ranked in the same
            list; they are not if a feature of the query, such as a history, differs between them. Of several lists
            there can be more hits than places: no measure is above 1 even then, but it is that of no list.
        ks: the K.
    """
    query, place = _places(query, item, rank)
    _, starts, relevant = np.unique(query, return_index=True, return_counts=True)
    # among the rows of its query, which one in the list each is, from 1
    number = np.arange(len(query)) - np.repeat(starts, relevant) + 1
    result = {}
    for k in ks:
        hit = place <= k
        hits, most = _sums(hit, starts), np.minimum(relevant, k)
        gain = hit / np.log2(np.where(hit, place, 1) + 1)
        best = np.cumsum(1 / np.log2(np.arange(1, k + 1) + 1))[most - 1]
        precision = np.minimum(hit * number / np.where(hit, place, 1), 1)
        most = np.maximum(most, hits)  # more only in several lists, in which the ideal gain can be exceeded too
        result[f"recall@{k}"] = _mean(hits / most)
        result[f"map@{k}"] = _mean(_sums(precision, starts) / most)
        result[f"ndcg@{k}"] = _mean(np.minimum(_sums(gain, starts) / best, 1))
    first = place[starts]
    result["mrr"] = _mean(np.where(first <= max(ks), 1 / first, 0))
    return result


def in_several_lists(
    query: NDArray[np.int64], item: NDArray[np.int64], rank: NDArray[np.int64], longest: int
) -> tuple[int, int]:
    """How many queries have two items at the same place, which one list cannot, and how many queries there are.

    query, item, rank: as `measures` takes them. longest: the largest K.
    """
    query, place = _places(query, item, rank)
    same = (query[1:] == query[:-1]) & (place[1:] == place[:-1]) & (place[1:] <= longest)
    return len(np.unique(query[1:][same])), len(np.unique(query))


def _places(
    query: NDArray[np.int64], item: NDArray[np.int64], rank: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Query and place of each pair of query and item, once and in this order; an item in no list is far away."""
    place = np.where(rank > 0, rank, np.iinfo(np.int64).max)
    order = np.lexsort((place, item, query))
    query, item, place = query[order], item[order], place[order]
    once = np.ones(len(query), bool)  # rows with the same pair lie side by side now, the best place first
    once[1:] = (query[1:] != query[:-1]) | (item[1:] != item[:-1])
    query, place = query[once], place[once]
    order = np.lexsort((place, query))
    return query[order], place[order]


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values.astype(np.float64), starts) if len(starts) else np.empty(0)


def _mean(values: np.ndarray) -> tuple[float, float]:
    if not len(values):
        return np.nan, np.nan
    spread = values.std(ddof=1) if len(values) > 1 else np.nan
    return float(values.mean()), float(_Z95 * spread / len(values) ** 0.5)


def frequency_slices(frequency: NDArray[np.int64], catalogue: NDArray[np.int64], head: float) -> NDArray[np.int8]:
    """(num_ids,) place in SLICES of each item: head, tail or never seen, by its frequency in train.

    catalogue: (N,) the items there are. head: share of them, the most frequent, that is head; of equally frequent
    items those with smaller ids.
    """
    result = np.where(frequency > 0, 1, 2).astype(np.int8)
    order = np.lexsort((catalogue, -frequency[catalogue]))
    most = catalogue[order[: round(head * len(catalogue))]]
    result[most[frequency[most] > 0]] = 0
    return result


def report(judged: Sequence[NDArray[np.int64]], config: RetrievalMetrics) -> dict[str, float]:
    """Every metric as `RetrievalMetrics.names` calls it, then again with "/slice=head" and so on at its end.

    judged: (n,) each: query, item and rank, as `measures` takes them, and the place in SLICES of each row's item. A
    slice's relevant items are those of it alone, in the same lists. Warns of queries that have several lists.
    """
    query, item, rank, of_slice = judged
    several, queries = in_several_lists(query, item, rank, max(config.k))
    if several:
        _log.warning(
            "%d of %d queries were ranked in several lists, as what is read or left out differs between their "
            "rows; leave metrics.retrieval.query empty, or give one row per query",
            several,
            queries,
        )
    result: dict[str, float] = {}
    parts = [("", np.ones(len(query), bool))] + [(f"/slice={n}", of_slice == i) for i, n in enumerate(SLICES)]
    for suffix, here in parts:
        found = measures(query[here], item[here], rank[here], config.k)
        result |= {f"{name}{suffix}": found[name][0] for name in found}
        result |= {f"{name}/{INTERVAL}{suffix}": found[name][1] for name in found}
    return result
