"""What metrics are computed from: the rows of many steps, of this rank or of all ranks.

Letters: n rows, T labels, G groups, B rows of one step.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from dist_rec.contract import StepOutput

_log = logging.getLogger(__name__)

_OFFLOAD_ROWS = 1 << 20  # an unbounded store leaves the device after this many rows: one wait per million rows
_MESSAGE_ROWS = 1 << 24  # rows of one message between ranks, which keeps it far below gloo's 2 GiB


@dataclass(frozen=True)
class Rows:
    """Rows with weight, as arrays in memory: rank 0's in the order of its steps, then rank 1's, and so on.

    Attributes:
        predictions: (n, T) float32 logits.
        labels: (n, T) float32.
        weights: (n,) float32, > 0.
        groups: name -> (n,) int64.
    """

    predictions: NDArray[np.float32]
    labels: NDArray[np.float32]
    weights: NDArray[np.float32]
    groups: dict[str, NDArray[np.int64]]


class _Chunk(NamedTuple):
    values: Tensor  # (B, 2T + 1) float32: predictions, labels, weight
    groups: Tensor  # (B, G) int64


class RowStore:
    """The rows of this rank's steps: all of them, or the newest `window_rows`.

    Takes 4 * (2T + 1) + 8 * G bytes per row (12 for one label, 20 with one group); about twice that on rank 0 while
    rows are merged, and 8 bytes more per row and array while a metric is computed. `append` copies, so that no
    step's output is kept alive, and never waits for the device; without a window, rows move to the host once per
    2**20.

    Example::

        store = RowStore(num_labels=1, groups=["user"])
        for output in outputs:
            store.append(output)
        rows = store.merged(gloo_group)  # on rank 0; None on the others
    """

    def __init__(self, *, num_labels: int, groups: Sequence[str] = (), window_rows: int | None = None) -> None:
        """An empty store.

        Args:
            num_labels: T.
            groups: names of the G groups to keep, of those that each step's output has.
            window_rows: keep only this rank's newest rows: as few whole steps as have `window_rows` rows, padding
                included. None keeps all.
        """
        self._num_labels = num_labels
        self._group_names = list(groups)
        self._window_rows = window_rows
        self._chunks: deque[_Chunk] = deque()
        self._held = 0  # rows in _chunks, padding included
        self._on_device = 0  # of these, appended since the last offload

    @torch.no_grad()
    def append(self, output: StepOutput) -> None:
        """Adds the rows of one step, on whichever device they are."""
        weights = output.weights.unsqueeze(1)
        values = torch.cat([output.predictions.float(), output.labels.float(), weights.float()], dim=1)
        groups = [output.groups[name] for name in self._group_names]
        stacked = torch.stack(groups, dim=1) if groups else values.new_empty((len(values), 0), dtype=torch.int64)
        self._push(_Chunk(values, stacked))
        if self._window_rows is None and self._on_device >= _OFFLOAD_ROWS:
            self._offload()

    def rows(self) -> Rows:
        """This rank's rows, without padding."""
        return self._as_rows(self._joined())

    def merged(self, group: dist.ProcessGroup | None = None) -> Rows | None:
        """The rows of all ranks on the group's rank 0, None on the others; collective.

        Args:
            group: a gloo group, as rows travel through host memory; None is the default group. Without an
                initialised process group this is `rows()`.

        Raises:
            ValueError: if the group cannot send from the host.
        """
        own = self._joined()
        if not dist.is_initialized() or dist.get_world_size(group) == 1:
            return self._as_rows(own)
        backend = dist.get_backend(group)
        if "gloo" not in backend:
            raise ValueError(
                f"metric rows are merged through host memory, but the process group's backend is '{backend}'; "
                "pass a group made with torch.distributed.new_group(backend='gloo')"
            )
        size = torch.tensor([len(own.values)])
        sizes = [torch.zeros_like(size) for _ in range(dist.get_world_size(group))]
        dist.all_gather(sizes, size, group=group)
        if dist.get_rank(group) != 0:
            for message in _messages(own):
                dist.send(message, group=group, group_dst=0)
            return None
        return self._as_rows(_received(own, [int(s) for s in sizes], group))

    def state(self) -> dict[str, Tensor]:
        """This rank's rows as host tensors for a checkpoint; `load_state` restores the window exactly.

        Returns "values" (n, 2T + 1) float32, "lengths" (steps,) int64 and "group.<name>" (n,) int64. n differs
        between ranks and steps.
        """
        chunks = _per_device([*self._chunks]) or [self._empty()]
        groups = torch.cat([c.groups.cpu() for c in chunks])
        return {
            "values": torch.cat([c.values.cpu() for c in chunks]),
            "lengths": torch.tensor([len(c.values) for c in self._chunks], dtype=torch.int64),
            **{f"group.{name}": groups[:, i].contiguous() for i, name in enumerate(self._group_names)},
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Adds the rows of `state`; of several, when this rank takes over those of more than one earlier rank.

        A state that lacks a group, because the settings of the metrics changed since, cannot be used: its rows are
        left out, with a warning.

        Raises:
            ValueError: if the state has another number of labels.
        """
        if state["values"].shape[1] != 2 * self._num_labels + 1:
            saved = (state["values"].shape[1] - 1) // 2
            raise ValueError(
                f"the saved metric rows have {saved} labels, but the schema has {self._num_labels}; "
                "resume with the schema of the checkpoint"
            )
        missing = [name for name in self._group_names if f"group.{name}" not in state]
        if missing:
            _log.warning("saved metric rows lack the group '%s'; the window of the metrics fills anew", missing[0])
            return
        columns = [state[f"group.{name}"] for name in self._group_names]
        groups = torch.stack(columns, dim=1) if columns else self._empty(len(state["values"])).groups
        lengths = state["lengths"].tolist()
        for values, stacked in zip(state["values"].split(lengths), groups.split(lengths), strict=True):
            self._push(_Chunk(values.clone(), stacked.clone()))

    def clear(self) -> None:
        """Forgets all rows."""
        self._chunks.clear()
        self._held = self._on_device = 0

    def _push(self, chunk: _Chunk) -> None:
        self._chunks.append(chunk)
        self._held += len(chunk.values)
        self._on_device += len(chunk.values)
        while self._window_rows is not None and self._held - len(self._chunks[0].values) >= self._window_rows:
            self._held -= len(self._chunks.popleft().values)

    def _offload(self) -> None:
        # Chunks before the last offload are left alone: joining them again each time would cost O(n^2).
        fresh: list[_Chunk] = []
        while self._on_device > 0:
            fresh.insert(0, self._chunks.pop())
            self._on_device -= len(fresh[0].values)
        self._held -= sum(len(c.values) for c in fresh)
        self._push(self._join(fresh))
        self._on_device = 0

    def _joined(self) -> _Chunk:
        return self._join([*self._chunks])

    def _join(self, chunks: list[_Chunk]) -> _Chunk:
        """`chunks` as one on the host, without the rows of weight 0."""
        chunks = [_without_padding(c.values.cpu(), c.groups.cpu()) for c in _per_device(chunks)] or [self._empty()]
        return _Chunk(torch.cat([c.values for c in chunks]), torch.cat([c.groups for c in chunks]))

    def _empty(self, rows: int = 0) -> _Chunk:
        width, names = 2 * self._num_labels + 1, len(self._group_names)
        return _Chunk(torch.zeros(rows, width), torch.zeros(rows, names, dtype=torch.int64))

    def _as_rows(self, chunk: _Chunk) -> Rows:
        values, groups, t = chunk.values.numpy(), chunk.groups.numpy(), self._num_labels
        return Rows(
            predictions=values[:, :t],
            labels=values[:, t : 2 * t],
            weights=values[:, 2 * t],
            groups={name: groups[:, i] for i, name in enumerate(self._group_names)},
        )


def _per_device(chunks: list[_Chunk]) -> list[_Chunk]:
    """Neighbours on one device joined, so that a window costs one copy to the host and not one per step."""
    joined: list[list[_Chunk]] = []
    for chunk in chunks:
        if not joined or joined[-1][0].values.device != chunk.values.device:
            joined.append([])
        joined[-1].append(chunk)
    return [_Chunk(torch.cat([c.values for c in run]), torch.cat([c.groups for c in run])) for run in joined]


def _without_padding(values: Tensor, groups: Tensor) -> _Chunk:
    kept = values[:, -1] != 0
    return _Chunk(values, groups) if bool(kept.all()) else _Chunk(values[kept], groups[kept])


def _messages(chunk: _Chunk) -> list[Tensor]:
    """Contiguous parts of `chunk` in the order in which they travel; parts that have no element do not."""
    parts = [part for tensor in chunk for part in tensor.split(_MESSAGE_ROWS)]
    return [part for part in parts if part.numel()]


def _received(own: _Chunk, sizes: list[int], group: dist.ProcessGroup | None) -> _Chunk:
    """Rank 0's rows and after them those of each rank, received straight into their place."""
    result = _Chunk(*(t.new_empty((sum(sizes), t.shape[1])) for t in own))
    start = 0
    for rank, size in enumerate(sizes):
        place = _Chunk(*(t[start : start + size] for t in result))
        if rank == 0:
            for target, source in zip(place, own, strict=True):
                target.copy_(source)
        else:
            for message in _messages(place):
                dist.recv(message, group=group, group_src=rank)
        start += size
    return result
