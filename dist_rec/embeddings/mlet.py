"""MLET: a table trained as two linear layers, projected on its shard before anything is sent.

A table E (n, d) is trained as W1 W2, with W1 (n, k) an ordinary sharded table and W2 (k, d) a small dense matrix, k > d
(Multi-Layer Embedding Training, arXiv 2309.15881, equation 7). Both layers are linear and so is pooling by sum: a shard
may apply W2 to its partial sums, and the exchange then carries d columns instead of k.

Letters: n rows, k inner width, d served width, B rows of all batches that a lookup serves, W ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchrec.distributed.embedding_types import ShardedEmbeddingTable, ShardingType
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

_SPLIT_BY_ROWS = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
_MOSTLY_FILLED = 0.8  # of the bags: packing then costs more than it saves
# ranks; with fewer, waiting for the number of filled bags costs more than it saves: an estimate, nobody has measured it
_PACKING_PAYS_ON_CUDA = 32


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
        self.__dict__["projections"] = projections = module.__dict__["projections"]
        super().__init__(module, *args, **kwargs)
        # hooks and not a wrapper: TorchRec looks for kernels and names inside the lookups
        for lookup, sharding_type in zip(self._lookups, self._sharding_types, strict=True):
            inner = getattr(lookup, "module", lookup)
            tables = [t for g in inner.grouped_configs for t in g.embedding_tables for _ in t.feature_names]
            widths = [(t.name, t.local_cols) for t in tables]
            hooks = _LookupHooks(widths, projections, self._scale(sharding_type))
            lookup.register_forward_hook(hooks.project)
            packs = self._device.type == "cpu" or self._env.world_size >= _PACKING_PAYS_ON_CUDA
            if packs and sharding_type in _SPLIT_BY_ROWS:
                lookup.register_forward_pre_hook(hooks.pack)

    def _scale(self, sharding_type: str) -> int:
        return 1 if sharding_type == ShardingType.DATA_PARALLEL.value else self._env.world_size

    def _create_output_dist(self) -> None:
        # the exchanges are built from the tables' widths, which for them are the served ones
        with _served_widths(self._embedding_shardings, self.__dict__["projections"]):
            super()._create_output_dist()


class _Column(NamedTuple):
    """Where one feature lies in the columns of a lookup's output, before and after the projection, and its table."""

    table: str
    inner: slice
    served: slice


class _Packing(NamedTuple):
    """Which of the B bags of each feature are filled here: these lie at the front, in order, the others nowhere.

    rows: per feature, the bags that are filled. places: (F, B), 1 + where each bag lies, 0 if it is empty.
    """

    rows: list[Tensor]
    places: Tensor

    @classmethod
    def of(cls, lengths: Tensor) -> _Packing:
        """lengths: (F, B) ids in each bag."""
        is_filled = lengths > 0
        return cls([row.nonzero().squeeze(1) for row in lengths], is_filled.cumsum(1) * is_filled)


class _LookupHooks:
    """What happens around the lookup of one rank: `pack` before it, `project` after it.

    Of a table that is split by rows a rank holds few of the ids of the global batch: with one id per bag only every
    W-th bag has anything to look up here. Packed to the front, the others cost neither look-up nor projection. All
    features are packed to the same number of bags, that of the fullest one.
    """

    def __init__(self, tables: list[tuple[str, int]], projections: Mapping[str, nn.Parameter], scale: int) -> None:
        self._projections, self._scale = projections, scale
        self._columns: list[_Column] = []
        inner = served = 0
        for name, width in tables:
            out = projections[name].shape[1] if name in projections else width
            self._columns.append(_Column(name, slice(inner, inner + width), slice(served, served + out)))
            inner, served = inner + width, served + out
        self._width = served
        self._here = list(dict.fromkeys(name for name, _ in tables if name in projections))
        self._packing: _Packing | None = None

    def pack(self, _: nn.Module, args: tuple) -> tuple | None:
        """The features without the bags that are empty here; `project` puts the others back in their place."""
        features: KeyedJaggedTensor = args[0]
        self._packing = None
        if not self._here or features.variable_stride_per_key():
            return None
        keys, batch = features.keys(), features.stride()
        lengths = features.lengths().view(len(keys), batch)
        packing = _Packing.of(lengths)
        longest = max(1, *map(len, packing.rows))
        if longest > _MOSTLY_FILLED * batch:
            return None
        packed = lengths.new_zeros(len(keys), longest)
        for target, row, filled in zip(packed, lengths, packing.rows, strict=True):
            target[: len(filled)] = row.index_select(0, filled)
        self._packing = packing
        # ids and weights stay as they are: an empty bag has none
        return (
            KeyedJaggedTensor(
                keys=keys,
                values=features.values(),
                weights=features.weights_or_none(),
                lengths=packed.view(-1),
                stride=longest,
                length_per_key=features.length_per_key_or_none(),
                offset_per_key=features.offset_per_key_or_none(),
            ),
        )

    def project(self, _: nn.Module, args: tuple, pooled: Tensor) -> Tensor:
        """pooled: (B, sum of inner widths) -> (B, sum of served widths); both flat with batch sizes per feature."""
        packing, self._packing = self._packing, None
        second = {name: _scaled(w, self._scale) for name, w in self._projections.items()}
        if self._here and args[0].variable_stride_per_key():
            return self._touching(self._project_ragged(args[0], pooled, second), second)
        if not self._here:
            return self._touching(pooled, second)
        return _Product.apply(pooled, self._columns, packing, self._width, list(second), *second.values())

    def _touching(self, product: Tensor, second: Mapping[str, Tensor]) -> Tensor:
        """The same values, with every second layer in their graph, see `_Product`."""
        return product + torch.stack([w.sum() for w in second.values()]).sum() * 0

    def _project_ragged(self, features: KeyedJaggedTensor, pooled: Tensor, second: Mapping[str, Tensor]) -> Tensor:
        """With a batch size per feature: TorchRec lays the rows out rank by rank, and in a rank feature by feature."""
        if pooled.dim() != 1:
            text = "TorchRec's CPU kernel of data-parallel tables takes no batch sizes per feature"
            raise NotImplementedError(f"{text}; shard them table-wise")
        strides = features.stride_per_key_per_rank()  # feature -> rank -> rows
        widths = [c.inner.stop - c.inner.start for c in self._columns]
        ranks = range(len(strides[0]))
        pieces = pooled.split([strides[f][r] * w for r in ranks for f, w in enumerate(widths)])
        count, result = len(widths), list(pieces)
        for f, (column, width) in enumerate(zip(self._columns, widths, strict=True)):
            if column.table in second:
                product = torch.cat(pieces[f::count]).view(-1, width) @ second[column.table]
                result[f::count] = [part.reshape(-1) for part in product.split(list(strides[f]))]
        return torch.cat(result)


class _Product(torch.autograd.Function):
    """The columns of every feature times its table's second layer.

    Products are written where they belong; automatic differentiation would split and concatenate the wide side twice.
    Every second layer is an argument, also those of tables that other ranks hold, whose gradient here is zero.
    Otherwise that would be complete on this rank before the exchange of looked-up vectors' gradients and on others
    after it; the ranks would begin that exchange and the sum of dense gradients in different orders, and wait for ever.
    """

    @staticmethod
    def forward(
        ctx: Any,
        pooled: Tensor,
        columns: list[_Column],
        packing: _Packing | None,
        width: int,
        names: list[str],
        *second: Tensor,
    ) -> Tensor:
        """pooled: (P, sum of inner widths), P = B unless packed. names: whose `second` are. Returns (B, width)."""
        ctx.columns, ctx.packing, ctx.names = columns, packing, names
        ctx.save_for_backward(pooled, *second)
        layers = dict(zip(names, second, strict=True))
        result = pooled.new_empty(len(pooled) if packing is None else packing.places.shape[1], width)
        for f, (table, inner, served) in enumerate(columns):
            w2, out = layers.get(table), result[:, served]
            if packing is not None:
                # gathered from behind a row of zeros: on CPU, scattering the rows took three times as long
                part = pooled[: len(packing.rows[f]), inner]
                products = pooled.new_empty(len(part) + 1, out.shape[1])
                products[0] = 0
                if w2 is None:
                    products[1:] = part
                else:
                    torch.mm(part, w2, out=products[1:])
                out.copy_(products.index_select(0, packing.places[f]))
            elif w2 is None:
                out.copy_(pooled[:, inner])
            else:
                torch.mm(pooled[:, inner], w2, out=out)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """gradient: (B, sum of served widths)."""
        pooled, *second = ctx.saved_tensors
        layers = dict(zip(ctx.names, second, strict=True))
        # a product with a matrix that lies transposed in memory is slower on CPU, by more than the copy costs
        here = {column.table for column in ctx.columns} & layers.keys()
        transposed = {name: layers[name].t().contiguous() for name in here}
        trained = any(ctx.needs_input_grad[5:])
        of_pooled = torch.empty_like(pooled)
        of_second = {name: torch.zeros_like(w) for name, w in layers.items()} if trained else {}
        for f, (table, inner, served) in enumerate(ctx.columns):
            part, count = gradient[:, served], len(pooled)
            if ctx.packing is not None:
                rows = ctx.packing.rows[f]
                part, count = part.index_select(0, rows), len(rows)
                of_pooled[count:, inner] = 0
            if table not in layers:
                of_pooled[:count, inner] = part
                continue
            torch.mm(part, transposed[table], out=of_pooled[:count, inner])
            if trained:  # the wide matrix is read as it lies in memory
                of_second[table] += (part.t() @ pooled[:count, inner]).t()
        return (of_pooled, None, None, None, None, *(of_second.get(name) for name in ctx.names))


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
