"""An exported catalogue: the vectors of all items as Parquet, an index over them, and lists for queries.

Letters: N items, V width of a vector, n queries, K items of a list.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dist_rec.data.batch import Batch
from dist_rec.data.catalogue import Catalogue
from dist_rec.data.ids import Ragged
from dist_rec.metrics.topk import exact_topk, merged, nothing
from dist_rec.settings import Complaint, ConfigError

QUERY, ITEM = "query", "item"
"""Folders of the towers in an export."""

VECTORS, INDEX = "items.parquet", "items.faiss"
LIST_COLUMNS = ("items", "scores")
_VECTOR = "vector"
_EXACT_UP_TO = 50_000  # items; an index that compares with all of them is as fast there
_LISTS_PER_ROOT = 4  # of an inverted file: 4 * sqrt(N), as FAISS advises
_TRAINED_ON = 64  # vectors for each inverted list


class Vectors(NamedTuple):
    """ids: (N,) int64. values: (N, V) float32."""

    ids: np.ndarray
    values: Tensor


def write_vectors(
    path: Path, key: str, catalogue: Catalogue, encode: Callable[[Batch], Tensor], batch_size: int
) -> None:
    """Writes columns `key` and "vector" of every item, in the order of the item table; a batch in memory at a time.

    encode: a batch of B items -> (B, V).
    """
    writer, at = None, 0
    try:
        for batch in catalogue.batches(0, 1, batch_size, {}):
            count = int((batch.weights > 0).sum())
            vectors = encode(batch)[:count].float().numpy()
            values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
            ids = np.asarray(catalogue.table.ids[at : at + count], np.int64)
            table = pa.table({key: ids, _VECTOR: values})
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
            at += count
    finally:
        if writer is not None:
            writer.close()


def _blocks(path: Path) -> Iterator[Vectors]:
    file = pq.ParquetFile(path)
    for i in range(file.num_row_groups):
        table = file.read_row_group(i)
        values = table.column(_VECTOR).combine_chunks()
        width = values.type.list_size
        yield Vectors(
            table.column(0).to_numpy(), torch.from_numpy(values.flatten().to_numpy().reshape(-1, width).copy())
        )


def read_vectors(path: Path) -> Vectors:
    """All vectors of an export. Memory: 4 * N * V bytes."""
    count, at = pq.ParquetFile(path).metadata.num_rows, 0
    ids, values = np.empty(count, np.int64), torch.empty(0)
    for block in _blocks(path):
        values = block.values.new_empty((count, block.values.shape[1])) if at == 0 else values
        here = slice(at, at + len(block.ids))
        ids[here], values[here] = block.ids, block.values
        at = here.stop
    return Vectors(ids, values)


def faiss() -> Any:
    """The module; ConfigError where it is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError as error:
        text = "needs the package faiss-cpu, which is not installed; run scripts/setup, or set export.index=none"
        raise ConfigError([Complaint("export.index", text)]) from error


def empty_index(factory: str, count: int, width: int, probes: int) -> tuple[Any, str]:
    """A FAISS index over inner products for N vectors of width V, and its description; nothing is computed for it yet.

    Args:
        factory: FAISS's description of an index, or "auto": exact up to 50,000 items, else an inverted file.
        count: N. width: V. probes: lists of an inverted file that a search reads.

    Raises:
        ConfigError: FAISS is not installed or knows no such index, or there are more inverted lists than items.
    """
    library = faiss()
    if factory == "auto":
        lists = 2 ** round(np.log2(_LISTS_PER_ROOT * count**0.5))
        factory = "Flat" if count <= _EXACT_UP_TO else f"IVF{lists},Flat"
    try:
        index = library.index_factory(width, f"IDMap,{factory}", library.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        text = f"is '{factory}', which FAISS does not understand; use auto, Flat, HNSW32, IVF1024,Flat or the like"
        raise ConfigError([Complaint("export.index", text)]) from error
    inverted = library.try_extract_index_ivf(index)
    if inverted is not None and inverted.nlist > count:
        text = f"is '{factory}', which has {inverted.nlist} lists for {count} items; use fewer lists, or auto"
        raise ConfigError([Complaint("export.index", text)])
    if inverted is not None:
        inverted.nprobe = min(probes, inverted.nlist)
    return index, factory


def write_index(index: Any, factory: str, vectors: Path, path: Path) -> None:
    """Fills an `empty_index` from the vectors' file, a row group at a time, and writes it. Memory: the index.

    Raises ConfigError if it cannot be trained on so few items.
    """
    library, count = faiss(), pq.ParquetFile(vectors).metadata.num_rows
    if not index.is_trained:
        inverted = library.try_extract_index_ivf(index)
        lists = inverted.nlist if inverted is not None else 0
        try:
            index.train(_sample(vectors, max(1, count // (_TRAINED_ON * (lists or _TRAINED_ON)))))
        except RuntimeError as error:
            having = f"with {lists} lists " if lists else ""
            text = f"is '{factory}', which {having}cannot be trained on {count} items; use auto, Flat or HNSW32"
            raise ConfigError([Complaint("export.index", text)]) from error
    for block in _blocks(vectors):
        index.add_with_ids(block.values.numpy(), block.ids)
    library.write_index(index, str(path))


def _sample(path: Path, every: int) -> np.ndarray:
    """Every so many vectors of the file."""
    return np.concatenate([block.values.numpy()[::every] for block in _blocks(path)])


def index_recall(path: Path, vectors: Path, queries: Tensor, k: int) -> float:
    """The share of the exact lists of length K that the index finds, mean over the queries (n, V). Memory: the index.

    vectors: their file, of which a row group is in memory at a time.
    """
    k = min(k, pq.ParquetFile(vectors).metadata.num_rows)
    _, found = faiss().read_index(str(path)).search(queries.numpy(), k)
    best = nothing(len(queries), k, queries.device)
    for ids, values in _blocks(vectors):
        part = exact_topk(queries, values, k)
        # where a block is too short for a list, the score says that there is nothing
        best = merged(best, part._replace(rows=torch.tensor(ids)[part.rows]), k)
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), best.rows.tolist(), strict=True)]
    return float(np.mean(hits)) / k


class Lists:
    """Answers queries with the K items of the largest inner product: all items are compared, or an index is asked.

    Args:
        excluded: features of a query whose items are left out of its list, cut to their max_length as the model reads
            them.
    """

    def __init__(self, export: Path, k: int, search: str, excluded: Sequence[str], device: torch.device) -> None:
        self._k, self._excluded = k, list(excluded)
        self._index: Any = faiss().read_index(str(export / INDEX)) if search == "index" else None
        if self._index is None:
            vectors = read_vectors(export / VECTORS)
            self._ids, self._values = vectors.ids, vectors.values.to(device)
            self._order = np.argsort(self._ids, kind="stable")

    @property
    def fields(self) -> list[pa.Field]:
        """The columns of the answers: the items of the list, best first, and their inner products."""
        return [pa.field(n, pa.list_(t)) for n, t in zip(LIST_COLUMNS, (pa.int64(), pa.float32()), strict=True)]

    def answer(self, queries: Tensor, batch: Batch) -> pa.Table:
        """queries: (B, V). batch: theirs, in host memory. Returns B rows of `fields`."""
        bags = {name: batch.sparse[name] for name in self._excluded}
        left_out = [Ragged(b.lengths().numpy(), b.values().numpy(), None) for b in bags.values()]
        if self._index is None:
            found = exact_topk(queries, self._values, self._k, excluded=self._pairs(left_out, queries.device))
            scores, rows = found.scores.cpu().numpy(), found.rows.cpu().numpy()
            items = np.where(rows >= 0, self._ids[rows], -1)
        else:
            scores, items = self._asked(queries.cpu().numpy(), left_out)
        kept = items >= 0
        ends = np.concatenate([[0], np.cumsum(kept.sum(axis=1))]).astype(np.int32)
        columns = (pa.array(items[kept]), pa.array(scores[kept].astype(np.float32)))
        return pa.table([pa.ListArray.from_arrays(ends, c) for c in columns], schema=pa.schema(self.fields))

    def _pairs(self, left_out: list[Ragged], device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(m,) queries and rows of the vectors that may not meet, ascending by row."""
        if not left_out:
            return None
        queries = np.concatenate([np.repeat(np.arange(len(b.lengths)), b.lengths) for b in left_out])
        items = np.concatenate([b.values for b in left_out]).astype(np.int64)
        place = np.searchsorted(self._ids, items, sorter=self._order).clip(max=len(self._ids) - 1)
        rows = self._order[place]
        known = self._ids[rows] == items
        order = np.argsort(rows[known], kind="stable")
        return torch.from_numpy(queries[known][order]).to(device), torch.from_numpy(rows[known][order]).to(device)

    def _asked(self, queries: np.ndarray, left_out: list[Ragged]) -> tuple[np.ndarray, np.ndarray]:
        """(B, K) of the index, asked for as many more items as are left out."""
        most = sum((b.lengths for b in left_out), np.zeros(len(queries), np.int64))
        scores, items = self._index.search(queries, self._k + int(most.max(initial=0)))
        bad = items < 0
        for bags in left_out:
            owner = np.repeat(np.arange(len(queries)), bags.lengths)
            place, at = (items[owner] == bags.values[:, None]).nonzero()
            bad[owner[place], at] = True
        order = np.argsort(bad, axis=1, kind="stable")[:, : self._k]
        items = np.where(bad, -1, items)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(items, order, 1)
