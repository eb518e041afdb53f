"""MLET: a table trained as two linear layers, projected on its shard before anything is sent.

A table E (n, d) is trained as W1 W2, with W1 (n, k) an ordinary sharded table and W2 (k, d) a small dense matrix, k > d
(Multi-Layer Embedding Training, arXiv 2309.15881, equation 7). Both layers are linear and so is pooling by sum: a shard
may apply W2 to its partial sums, and the exchange then carries d columns instead of k.

Letters: n rows, k inner width, d served width, B rows of all batches that a lookup serves, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.embedding_types import ShardedEmbeddingTable, ShardingType
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor


class FactoredCollection(EmbeddingBagCollection):
    """A collection in which some tables are followed by a projection; the others pass through.

    Args:
        tables: as EmbeddingBagCollection takes them, a factored one with its inner width k.
        projections: table name -> W2 (k, d). They belong to whoever passes them and are not registered here: they are
            dense parameters, which data parallelism must see outside of the sharded module.
    """

    def __init__(
        self,
        tables: list[EmbeddingBagConfig],
        projections: Mapping[str, nn.Parameter],
        *,
        is_weighted: bool,
        device: torch.device,
    ) -> None:
        super().__init__(tables=tables, is_weighted=is_weighted, device=device)
        self.__dict__["projections"] = projections

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """The pooled features, each as wide as it is served."""
        pooled = super().forward(features)
        tables = [c for c in self.embedding_bag_configs() for _ in c.feature_names]
        parts = torch.split(pooled.values(), [c.embedding_dim for c in tables], dim=1)
        projections = self.__dict__["projections"]
        served = [x @ projections[c.name] if c.name in projections else x for c, x in zip(tables, parts, strict=True)]
        return KeyedTensor(pooled.keys(), [x.shape[1] for x in served], torch.cat(served, dim=1))


class ShardedFactoredCollection(ShardedEmbeddingBagCollection):
    """The sharded twin: every lookup's partial sums are projected before its output exchange.

    The gradient of W2 that a rank computes is that of its shard alone. TorchRec has divided the incoming gradient by W
    already, so the shards' parts must be *added*; data parallelism averages them. They are therefore scaled by W,
    except for data-parallel tables, where a rank computes the gradient of its own rows, as for any dense parameter.
    """

    def __init__(self, module: FactoredCollection, *args: Any, **kwargs: Any) -> None:
        self.__dict__["projections"] = module.__dict__["projections"]
        super().__init__(module, *args, **kwargs)
        # a hook and not a wrapper: TorchRec looks for kernels and names inside the lookups
        for lookup, sharding_type in zip(self._lookups, self._sharding_types, strict=True):
            inner = getattr(lookup, "module", lookup)
            widths = [(t.name, t.local_cols) for g in inner.grouped_configs for t in g.embedding_tables
                      for _ in t.feature_names]  # fmt: skip
            lookup.register_forward_hook(partial(self._project, widths, self._scale(sharding_type)))

    def _scale(self, sharding_type: str) -> int:
        return 1 if sharding_type == ShardingType.DATA_PARALLEL.value else self._env.world_size

    def _project(self, tables: list[tuple[str, int]], scale: int, _: nn.Module, args: tuple, pooled: Tensor) -> Tensor:
        """pooled: (B, sum of inner widths) -> (B, sum of served widths)."""
        projections = self.__dict__["projections"]
        if pooled.dim() != 2:
            raise NotImplementedError("two-layer tables with a batch size per feature")
        if not any(name in projections for name, _ in tables):
            return pooled
        second = {n: _scaled(projections[n], scale) for n, _ in tables if n in projections}
        parts = torch.split(pooled, [width for _, width in tables], dim=1)
        pairs = zip(tables, parts, strict=True)
        return torch.cat([x @ second[name] if name in second else x for (name, _), x in pairs], dim=1)

    def _create_output_dist(self) -> None:
        # the exchanges are built from the tables' widths, which for them are the served ones
        with _served_widths(self._embedding_shardings, self.__dict__["projections"]):
            super()._create_output_dist()


@contextmanager
def _served_widths(shardings: list[Any], projections: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Factored tables look d wide while this lasts, in every sharding."""
    tables: dict[int, tuple[ShardedEmbeddingTable, int, int]] = {}
    for sharding in shardings:
        for groups in sharding._grouped_embedding_configs_per_rank:
            for table in (t for group in groups for t in group.embedding_tables if t.name in projections):
                tables.setdefault(id(table), (table, table.local_cols, table.embedding_dim))
    try:
        for table, *_ in tables.values():
            table.local_cols = table.embedding_dim = projections[table.name].shape[1]
        yield
    finally:
        for table, local_cols, embedding_dim in tables.values():
            table.local_cols, table.embedding_dim = local_cols, embedding_dim


def _scaled(projection: nn.Parameter, scale: int) -> Tensor:
    """The same values; their gradient is multiplied by `scale` on its way to the parameter."""
    if scale == 1 or not projection.requires_grad or not torch.is_grad_enabled():
        return projection
    view = projection.view_as(projection)
    view.register_hook(lambda gradient: gradient * scale)
    return view
