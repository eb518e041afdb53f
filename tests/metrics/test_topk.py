"""Exact search against sorting everything, for any block size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dist_rec.metrics import topk
from dist_rec.metrics.topk import exact_topk

Q, N, D = 9, 301, 6


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
@pytest.mark.parametrize("k", [1, 10, 400])
@pytest.mark.parametrize("excludes", [False, True])
def test_equals_a_full_sort(block, k, excludes):
    g = torch.Generator().manual_seed(block + k)
    queries, vectors = torch.randn(Q, D, generator=g), torch.randn(N, D, generator=g)
    scores, excluded = queries @ vectors.T, None
    if excludes:
        best = scores.topk(3, dim=1).indices  # the best are the ones that would be missed
        pairs = torch.stack([torch.arange(Q).repeat_interleave(3), best.flatten()])
        pairs = pairs[:, pairs[1].argsort()]
        scores[pairs[0], pairs[1]] = -torch.inf
        excluded = pairs[0], pairs[1]
    found = exact_topk(queries, vectors, k, block=block, excluded=excluded)
    expected, order = scores.sort(dim=1, descending=True)
    some = min(k, N - 3 if excludes else N)
    torch.testing.assert_close(found.scores[:, :some], expected[:, :some])
    assert torch.equal(found.rows[:, :some], order[:, :some])
    assert (found.rows[:, some:] == -1).all()
    assert (found.scores[:, some:] == -torch.inf).all()


class _Products(TorchDispatchMode):
    """Shapes of all products of matrices, and the size of the largest tensor that anything gives."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        parts = result if isinstance(result, tuple | list) else [result]
        self.largest = max([self.largest, *(t.numel() for t in parts if isinstance(t, torch.Tensor))])
        if func.overloadpacket is torch.ops.aten.mm:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize(("block", "most"), [(64, 200), (7, 64), (64, 40), (1000, 2000), (64, 10**6)])
def test_scores_are_bounded_whatever_the_number_of_queries_and_the_result_is_the_same(monkeypatch, block, most):
    g = torch.Generator().manual_seed(most)
    queries, vectors = torch.randn(90, D, generator=g), torch.randn(N, D, generator=g)
    pairs = torch.stack([torch.arange(90).repeat_interleave(3), (queries @ vectors.T).topk(3).indices.flatten()])
    excluded = tuple(pairs[:, pairs[1].argsort()])
    expected = exact_topk(queries, vectors, 2, block=N, excluded=excluded)
    monkeypatch.setattr(topk, "_MOST_SCORES", most)
    with _Products() as seen:
        found = exact_topk(queries, vectors, 2, block=block, excluded=excluded)
    torch.testing.assert_close(found.scores, expected.scores)
    assert torch.equal(found.rows, expected.rows)
    width = min(block, N, most)
    assert max(columns for _, columns in seen.shapes) == width
    assert max(rows for rows, _ in seen.shapes) == min(90, most // width)
    assert sum(rows * columns for rows, columns in seen.shapes) == 90 * N
    # beside the scores: as many candidates at most, the vectors, the pairs and the results
    assert seen.largest <= max(min(most, 90 * width), N * D, 3 * 90)


def test_no_vectors_and_no_queries():
    assert (exact_topk(torch.randn(2, D), torch.randn(0, D), 3).rows == -1).all()
    assert exact_topk(torch.randn(0, D), torch.randn(5, D), 3).rows.shape == (0, 3)


def test_equal_scores_fill_the_list_with_different_rows():
    found = exact_topk(torch.ones(3, D), torch.ones(N, D), 50, block=16)
    assert all(len(set(rows.tolist())) == 50 for rows in found.rows)


def test_a_first_block_without_anything_allowed_and_vectors_that_get_better_and_better():
    vectors = torch.arange(1.0, N + 1)[:, None].expand(N, D).contiguous()
    queries = torch.ones(2, D)
    pairs = (torch.zeros(64, dtype=torch.int64), torch.arange(64))  # query 0 alone
    found = exact_topk(queries, vectors[:80], 20, block=64, excluded=pairs)
    assert found.rows[0].tolist() == [*range(79, 63, -1), -1, -1, -1, -1]
    assert found.rows[1].tolist() == list(range(79, 59, -1))
    assert exact_topk(queries, vectors, 20, block=64).rows[0].tolist() == list(range(300, 280, -1))
