"""Ranking measures by hand and against a plain loop over queries; slices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_rec.data.schema import GroupColumn, Schema, SparseColumn
from dist_rec.metrics.compute import direction, names
from dist_rec.metrics.retrieval import RetrievalMetrics, frequency_slices, measures, report


def test_by_hand():
    # query 1: three relevant items, found at places 1 and 4; query 2: one, at 3; query 3: two, none found
    query, item = np.array([1, 2, 1, 3, 1, 3]), np.array([10, 20, 11, 30, 12, 31])
    rank = np.array([4, 3, 1, 0, 0, 0])
    found = {name: mean for name, (mean, _) in measures(query, item, rank, [2, 5]).items()}
    assert found["recall@2"] == pytest.approx((1 / 2 + 0 + 0) / 3)  # min(K, R) = 2
    assert found["recall@5"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert found["map@2"] == pytest.approx((1 / 2) / 3)
    assert found["map@5"] == pytest.approx(((1 + 2 / 4) / 3 + 1 / 3 + 0) / 3)
    ideal = 1 + 1 / math.log2(3) + 1 / 2
    assert found["ndcg@5"] == pytest.approx(((1 + 1 / math.log2(5)) / ideal + 1 / math.log2(4)) / 3)
    assert found["mrr"] == pytest.approx((1 + 1 / 3) / 3)


def test_equals_a_loop_over_queries_and_does_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    query = rng.integers(0, 40, 300)
    lists = {q: rng.permutation(200)[:20] for q in range(40)}
    item = rng.integers(0, 200, 300)
    item[::3] = [lists[q][rng.integers(0, 20)] for q in query[::3]]
    rank = np.array(
        [int(np.argmax(lists[q] == i)) + 1 if i in lists[q] else 0 for q, i in zip(query, item, strict=True)]
    )
    found = measures(query, item, rank, [5, 20])
    for k in (5, 20):
        recalls, precisions = [], []
        for q in np.unique(query):
            relevant, hits, total = set(item[query == q]), 0, 0.0
            for place, i in enumerate(lists[q][:k], 1):
                if i in relevant:
                    hits += 1
                    total += hits / place
            recalls.append(hits / min(k, len(relevant)))
            precisions.append(total / min(k, len(relevant)))
        assert found[f"recall@{k}"][0] == pytest.approx(np.mean(recalls))
        assert found[f"map@{k}"][0] == pytest.approx(np.mean(precisions))
        half = 1.96 * np.std(recalls, ddof=1) / len(recalls) ** 0.5
        assert found[f"recall@{k}"][1] == pytest.approx(half, rel=1e-3)
    shuffled = rng.permutation(300)
    again = measures(query[shuffled], item[shuffled], rank[shuffled], [5, 20])
    assert {n: pytest.approx(v) for n, v in again.items()} == found


def test_a_pair_that_occurs_twice_counts_once_at_its_best_place():
    """The rows of a query may be ranked in different lists, as when their histories differ."""
    twice = measures(np.array([1, 1, 1]), np.array([5, 5, 7]), np.array([4, 2, 3]), [3, 5])
    once = measures(np.array([1, 1]), np.array([5, 7]), np.array([2, 3]), [3, 5])
    assert {n: mean for n, (mean, _) in twice.items()} == {n: mean for n, (mean, _) in once.items()}


def test_several_lists_of_a_query_give_no_measure_above_1_and_are_told_of(caplog):
    rows = 25  # items of one query, each in the first ten places of a list of its own
    query, item, rank = np.zeros(rows, np.int64), np.arange(rows), np.arange(rows) % 10 + 1
    found = measures(query, item, rank, [1, 10, 50])
    assert all(mean <= 1 for mean, _ in found.values())
    assert found["recall@10"][0] == found["recall@1"][0] == found["ndcg@10"][0] == 1
    both_first = measures(np.array([1, 1]), np.array([5, 6]), np.array([1, 1]), [5])
    assert both_first["ndcg@5"][0] == both_first["map@5"][0] == 1
    # query 2 has one list as far as one can see, with two items beyond its end; of query 3 a pair occurs twice
    query, item = np.append(query, [2, 2, 2, 3, 3]), np.append(item, [1, 2, 3, 1, 1])
    rank = np.append(rank, [0, 0, 4, 4, 4])
    report([query, item, rank, np.zeros(len(query), np.int8)], RetrievalMetrics(k=[10, 50]))
    (record,) = caplog.records
    assert "1 of 3 queries were ranked in several lists" in record.getMessage()
    report([query[rows:], item[rows:], rank[rows:], np.zeros(5, np.int8)], RetrievalMetrics(k=[10, 50]))
    assert len(caplog.records) == 1


def test_slices_are_head_tail_and_unseen():
    frequency = np.array([5, 0, 9, 1, 0, 3, 7, 1, 1, 1, 4])  # item 4 is not in the catalogue, item 1 is, unseen
    catalogue = np.array([0, 1, 2, 3, 5, 6, 7, 8, 9, 10])
    assert frequency_slices(frequency, catalogue, 0.2).tolist() == [1, 2, 0, 1, 2, 1, 0, 1, 1, 1, 1]
    # of equally frequent items the first ids; an item never seen is no head, however small the catalogue's tail
    assert frequency_slices(np.array([1, 1, 1, 0]), np.arange(4), 0.5).tolist() == [0, 0, 1, 2]
    assert frequency_slices(np.array([1, 0, 0, 0]), np.arange(4), 0.5).tolist() == [0, 2, 2, 2]


def test_a_report_has_its_names_and_slices_count_their_own_items():
    query, item, rank = np.array([1, 1, 2]), np.array([5, 6, 7]), np.array([2, 1, 3])
    config = RetrievalMetrics(k=[5])
    found = report([query, item, rank, np.array([0, 1, 1])], config)
    assert list(config.names()) == [n for n in found if "slice" not in n]
    assert found["recall@5/slice=head"] == 1 and found["mrr/slice=head"] == 1 / 2
    assert found["mrr/slice=tail"] == pytest.approx((1 + 1 / 3) / 2)
    assert math.isnan(found["recall@5/slice=unseen"])


def test_names_say_what_is_better_and_settings_are_checked():
    schema = Schema(labels={}, sparse={"s": SparseColumn(2)}, groups={"user": GroupColumn("user")})
    from dist_rec.metrics.compute import MetricsConfig

    listed = names(schema, MetricsConfig(), "retrieval")
    assert [n for n in listed if direction(n) == 1] == [n for n in listed if not n.endswith("/ci")]
    assert all(direction(n) == 0 for n in listed if n.endswith("/ci"))
    bad = RetrievalMetrics(k=[10, 0], query="usr", head=1.0, block=0, exclude=["s"])
    assert {c.key for c in bad.check(schema)} == {"k", "query", "head", "block", "exclude"}
    assert list(RetrievalMetrics(query="user").check(schema)) == []
