"""Exact search: the K vectors with the largest inner product, block by block in bounded memory.

Letters: Q queries, N vectors of D columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_CANDIDATES = 0.125  # share of a block above the K-th best so far; below it, selecting first is faster


class TopK(NamedTuple):
    """scores: (Q, K) float32, descending. rows: (Q, K) int64, -1 where there is nothing (the score is then -inf)."""

    scores: Tensor
    rows: Tensor


def exact_topk(
    queries: Tensor, vectors: Tensor, k: int, *, block: int = 8192, excluded: tuple[Tensor, Tensor] | None = None
) -> TopK:
    """The K largest of `queries @ vectors.T` for each query. Memory: Q * block scores.

    Args:
        queries: (Q, D) float32. vectors: (N, D) float32.
        excluded: (m,) queries and (m,) rows of `vectors` that may not be found together, ascending by row.
    """
    count = len(queries)
    best = nothing(count, k, queries.device)
    for start in range(0, len(vectors), block):
        scores = queries @ vectors[start : start + block].T
        if excluded is not None:
            low, high = torch.searchsorted(excluded[1], torch.tensor([start, start + block], device=scores.device))
            scores[excluded[0][low:high], excluded[1][low:high] - start] = -torch.inf
        found = _candidates(scores, best.scores[:, -1:], k, start)
        best = merged(best, found, k) if found is not None else best
    return best


def nothing(count: int, k: int, device: torch.device) -> TopK:
    """The result before anything was seen."""
    rows = torch.full((count, k), -1, dtype=torch.int64, device=device)
    return TopK(torch.full((count, k), -torch.inf, device=device), rows)


def merged(one: TopK, other: TopK, k: int) -> TopK:
    """The K best of both; of equal scores those of `one` come first."""
    scores, order = torch.cat([one.scores, other.scores], 1).sort(dim=1, descending=True, stable=True)
    rows = torch.cat([one.rows, other.rows], 1).gather(1, order[:, :k])
    return TopK(scores[:, :k], rows.masked_fill(scores[:, :k] == -torch.inf, -1))


def _candidates(scores: Tensor, least: Tensor, k: int, start: int) -> TopK | None:
    """Of a block, at least all that can still be among the K best; None if there is nothing."""
    above = scores > least
    width = int(above.sum(dim=1).max()) if above.numel() else 0
    if width == 0:
        return None
    if width > _CANDIDATES * scores.shape[1]:
        values, columns = scores.topk(min(k, scores.shape[1]), dim=1)
        return TopK(values, columns + start)
    query, column = above.nonzero(as_tuple=True)
    counts = above.sum(dim=1)
    place = torch.arange(len(query), device=scores.device) - (counts.cumsum(0) - counts)[query]
    found = nothing(len(scores), width, scores.device)
    found.scores[query, place] = scores[query, column]
    found.rows[query, place] = column + start
    return found
