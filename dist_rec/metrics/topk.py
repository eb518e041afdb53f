"""Exact search: the K vectors with the largest inner product, block by block in bounded memory.

Letters: Q queries, N vectors of D columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_MOST_SCORES = 2**25  # in memory at a time: 128 MiB
_CANDIDATES = 0.125  # share of a block above the K-th best so far; beyond it, selecting within the block is faster


class TopK(NamedTuple):
    """scores: (Q, K) float32, descending. rows: (Q, K) int64, -1 where there is nothing (the score is then -inf)."""

    scores: Tensor
    rows: Tensor


@torch.no_grad()
def exact_topk(
    queries: Tensor,
    vectors: Tensor,
    k: int,
    *,
    block: int = 8192,
    excluded: tuple[Tensor, Tensor] | None = None,
) -> TopK:
    """The K largest of `queries @ vectors.T` for each query. Memory: `_MOST_SCORES`, however many queries there are.

    Args:
        queries: (Q, D) float32. vectors: (N, D) float32.
        block: vectors that are compared at a time, with as many queries as `_MOST_SCORES` has room for.
        excluded: (m,) queries and (m,) rows of `vectors` that may not be found together, ascending by row.
    """
    block = max(1, min(block, len(vectors), _MOST_SCORES))
    step = max(1, _MOST_SCORES // block)
    room = queries.new_empty(min(step, len(queries)) * block)  # fresh memory for every block costs page faults
    found = [nothing(0, k, queries.device)]
    for first in range(0, len(queries), step):
        part, pairs = queries[first : first + step], excluded
        if excluded is not None and len(part) < len(queries):
            here = (excluded[0] >= first) & (excluded[0] < first + step)
            pairs = excluded[0][here] - first, excluded[1][here]
        found.append(_searched(part, vectors, k, block, pairs, room))
    return TopK(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _searched(
    queries: Tensor, vectors: Tensor, k: int, block: int, excluded: tuple[Tensor, Tensor] | None, room: Tensor
) -> TopK:
    """The K best for queries whose scores with a block fit into `room`."""
    best = nothing(len(queries), k, queries.device)
    for start in range(0, len(vectors), block):
        part = vectors[start : start + block]
        scores = torch.mm(queries, part.T, out=room[: len(queries) * len(part)].view(len(queries), len(part)))
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
    columns = scores.shape[1]
    # before the first block everything is above nothing; a GPU selects as fast as it compares
    if start and scores.device.type == "cpu":
        # numpy finds what is true ten times faster than torch, and torch's sums of bools are slower than a product
        place = np.flatnonzero((scores > least).numpy())
        query, column = np.divmod(place, columns)
        counts = np.bincount(query, minlength=len(scores))
        width = int(counts.max(initial=0))
        if width == 0:
            return None
        if width <= _CANDIDATES * columns:
            at = np.arange(len(place)) - (np.cumsum(counts) - counts)[query]
            found = nothing(len(scores), width, scores.device)
            found.scores.numpy()[query, at] = scores.numpy().reshape(-1)[place]
            found.rows.numpy()[query, at] = column + start
            return found
    values, rows = scores.topk(min(k, columns), dim=1)
    return TopK(values, rows + start)
