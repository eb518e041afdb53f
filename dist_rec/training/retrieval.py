"""Exact retrieval over the whole catalogue: where the list of each query has the item of its row.

Every rank encodes its share of the items and keeps the vectors; each batch's queries go to all ranks, each searches its
share, and the best of all shares come back to the query's rank. Letters: B queries of this rank, W ranks, N items, D
columns of a vector, K length of the longest list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dist_rec.contract import StepOutput
from dist_rec.data.bags import unpacked
from dist_rec.data.batch import Batch
from dist_rec.data.catalogue import Catalogue
from dist_rec.data.ids import Ragged
from dist_rec.data.join import ITEM
from dist_rec.data.positives import Positives
from dist_rec.data.views import Views
from dist_rec.metrics.retrieval import RetrievalMetrics, frequency_slices
from dist_rec.metrics.topk import TopK, exact_topk, merged
from dist_rec.training.runtime import Runtime


@dataclass
class RetrievalTask:
    """What is searched, and what was seen before.

    Attributes:
        batch_size: items that a rank encodes at a time. views: those whose keys the model's batches have.
        earlier: the positives of the splits before the one that is evaluated.
        frequency: (num_ids,) rows with each item in train.
    """

    catalogue: Catalogue
    batch_size: int
    views: Views = field(default_factory=dict)
    earlier: Sequence[Positives] = ()
    frequency: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def batches(self, runtime: Runtime) -> tuple[Iterator[Batch], int]:
        """This rank's share of the items, and how many batches there are on every rank."""
        count = -(-len(self.catalogue) // runtime.world_size)
        batches = self.catalogue.batches(runtime.rank, runtime.world_size, self.batch_size, self.views)
        return batches, -(-count // self.batch_size)


def item_vectors(outputs: Iterable[StepOutput], count: int) -> Tensor:
    """The first `count` vectors of the representation "item", (count, D) float32 on their device. Memory: that."""
    vectors, at = torch.empty(0), 0
    for output in outputs:
        found = output.representations["item"][: count - at]
        if at == 0:
            vectors = found.new_empty((count, found.shape[1]))
        vectors[at : at + len(found)] = found
        at += len(found)
    return vectors


class Search:
    """The K best items of each query, over the vectors of all ranks. Making one sorts the items by their frequency.

    `judged` is collective.
    """

    def __init__(self, task: RetrievalTask, vectors: Tensor, config: RetrievalMetrics, runtime: Runtime) -> None:
        self._task, self._vectors, self._config, self._runtime = task, vectors, config, runtime
        self._mine = task.catalogue.share(runtime.rank, runtime.world_size)
        self._slices = frequency_slices(task.frequency, task.catalogue.table.ids, config.head)
        self._rows_seen = 0

    def judged(self, output: StepOutput, excluded: Sequence[Ragged] = ()) -> StepOutput:
        """`output` with what metrics are computed from as groups: `JUDGED`. excluded: `listed` of the batch."""
        item = output.groups[ITEM].cpu().numpy()
        query = self._queries(output, len(item))
        target = self._task.catalogue.table.rows(np.maximum(item, 0))
        bags = [*excluded, *(p.of(query) for p in self._task.earlier if self._config.query is not None)]
        pairs = self._excluded(bags, target, output.weights.cpu().numpy())
        found = self._best(output.representations["query"], pairs)
        hit = (found.rows.cpu() == torch.from_numpy(target)[:, None]) & torch.from_numpy(target >= 0)[:, None]
        rank = torch.where(hit.any(dim=1), hit.int().argmax(dim=1) + 1, 0)
        judged = (query, item, rank.numpy(), self._slices[np.maximum(item, 0)])
        values = (torch.from_numpy(np.asarray(x, np.int64)).to(output.weights.device) for x in judged)
        return output._replace(groups={**output.groups, **dict(zip(JUDGED, values, strict=True))}, representations={})

    def _queries(self, output: StepOutput, count: int) -> np.ndarray:
        if self._config.query is not None:
            return output.groups[self._config.query].cpu().numpy()
        self._rows_seen += count
        return (self._rows_seen - count + np.arange(count)) * self._runtime.world_size + self._runtime.rank

    def _excluded(self, bags: Sequence[Ragged], target: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """(2, m): row of the batch and row of the catalogue of each id in `bags` other than the row's own item."""
        found = [np.empty((2, 0), np.int64)]
        for items in bags:
            rows = self._task.catalogue.table.rows(items.values)
            places = np.repeat(np.arange(len(items.lengths)), items.lengths)
            kept = (rows >= 0) & (rows != target[places]) & (weights[places] > 0)
            found.append(np.stack([places[kept], rows[kept]]))
        return np.concatenate(found, axis=1)

    def _best(self, queries: Tensor, excluded: np.ndarray) -> TopK:
        """queries: (B, D) of this rank. Returns the K best of all N items for them, by their row in the catalogue."""
        runtime, k = self._runtime, max(self._config.k)
        everyone = gathered(queries, runtime)
        pairs = _gathered_pairs(excluded + np.array([[runtime.rank * len(queries)], [0]]), runtime)
        pairs = pairs[:, (pairs[1] >= self._mine.start) & (pairs[1] < self._mine.stop)]
        pairs = pairs[:, np.argsort(pairs[1], kind="stable")]
        rows = torch.from_numpy(pairs[1] - self._mine.start).to(queries.device)
        best = exact_topk(
            everyone, self._vectors, k, block=self._config.block,
            excluded=(torch.from_numpy(pairs[0]).to(queries.device), rows),
        )  # fmt: skip
        best = best._replace(rows=torch.where(best.rows >= 0, best.rows + self._mine.start, -1))
        return best if runtime.world_size == 1 else self._returned(best, len(queries), k)

    def _returned(self, best: TopK, count: int, k: int) -> TopK:
        """The best of this rank's share for everyone's queries -> of all shares for its own."""
        parts = []
        for sent in best:
            received = torch.empty_like(sent.contiguous())
            dist.all_to_all_single(received, sent.contiguous(), group=self._runtime.group)
            parts.append(received.view(-1, count, k).transpose(0, 1).reshape(count, -1))
        scores, rows = parts
        return merged(TopK(scores[:, :k], rows[:, :k]), TopK(scores[:, k:], rows[:, k:]), k)


JUDGED = ("retrieval_query", "retrieval_item", "retrieval_rank", "retrieval_slice")
"""Groups that `Search.judged` adds: the query's number, the row's item, its place in the list from 1 (0: not in it) and
its slice."""


def listed(batch: Batch, config: RetrievalMetrics) -> list[Ragged]:
    """The bags of the features whose ids are left out of the lists; of a batch in host memory."""
    bags = unpacked(batch.sparse) if config.exclude else {}
    return [bags[name] for name in config.exclude]


def gathered(values: Tensor, runtime: Runtime) -> Tensor:
    """(W * B, ...) the (B, ...) values of all ranks."""
    if runtime.world_size == 1:
        return values
    result = values.new_empty((runtime.world_size * len(values), *values.shape[1:]))
    dist.all_gather_into_tensor(result, values.contiguous(), group=runtime.group)
    return result


def _gathered_pairs(pairs: np.ndarray, runtime: Runtime) -> np.ndarray:
    """(2, m) of each rank -> (2, sum of m), through host memory."""
    if runtime.world_size == 1:
        return pairs
    size = torch.tensor([pairs.shape[1]])
    sizes = [torch.zeros_like(size) for _ in range(runtime.world_size)]
    dist.all_gather(sizes, size, group=runtime.control)
    most = max(int(s) for s in sizes)
    padded = torch.zeros(2, most, dtype=torch.int64)
    padded[:, : pairs.shape[1]] = torch.from_numpy(pairs)
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=runtime.control)
    return np.concatenate([p.numpy()[:, : int(s)] for p, s in zip(parts, sizes, strict=True)], axis=1)
