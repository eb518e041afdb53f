"""`Batch`: one rank's share of one step, the only thing that travels from the loader to the model.

Letters: B rows of this rank, Nd dense columns, F sparse features, T labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable


@dataclass
class Batch(Pipelineable):
    """B rows of one rank, in the order the loader dealt them.

    Attributes:
        dense: (B, Nd) float32, columns in schema order, already filled, transformed and standardised.
        sparse: one KeyedJaggedTensor with the F features in schema order, B bags each; the key order is the
            same in every batch of a run, as TorchRec fixes it by the first batch.
        labels: (B, T) float32, columns in schema order.
        weights: (B,) float32, the sample weight; exactly 0 for the rows that only pad the last batch of an
            epoch, which have empty bags and count in no loss and no metric.
        groups: name -> (B,) int64, what metrics and methods group rows by (a domain, a cohort, a user); -1 in padding
            rows.
        view_dense: view -> (B, Nd) float32, the dense columns of another view of the same rows; empty unless an
            auxiliary's transform added views.
    """

    dense: Tensor
    sparse: KeyedJaggedTensor
    labels: Tensor
    weights: Tensor
    groups: dict[str, Tensor] = field(default_factory=dict)
    view_dense: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        return self._map(lambda x: x.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU overlap with computation."""
        return self._map(lambda x: x.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Tells the allocator that `stream` uses these tensors, as TorchRec's pipelines ask of a batch."""
        for x in (self.dense, self.sparse, self.labels, self.weights):
            x.record_stream(stream)
        for x in (*self.groups.values(), *self.view_dense.values()):
            x.record_stream(stream)

    def _map(self, f: Callable) -> Batch:
        return Batch(
            dense=f(self.dense),
            sparse=f(self.sparse),
            labels=f(self.labels),
            weights=f(self.weights),
            groups={name: f(x) for name, x in self.groups.items()},
            view_dense={name: f(x) for name, x in self.view_dense.items()},
        )
