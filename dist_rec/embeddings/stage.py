"""One KeyedJaggedTensor in, one tensor per table set out.

Letters: B rows of this rank, F features of a set, D its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from dist_rec.contract import TableSet
from dist_rec.data.views import feature_of
from dist_rec.embeddings.mlet import FactoredCollection
from dist_rec.embeddings.tables import Table, output_names


def second_layer_of(name: str) -> str | None:
    """Name of a table's weights in the model's state -> name of its second layer, which a plain table does not have."""
    first = "embeddings.collection.embedding_bags."
    return f"embeddings.projections.{name[len(first) :].removesuffix('.weight')}" if name.startswith(first) else None


class EmbeddingStage(nn.Module):
    """All tables of a model in one collection, so that a step has one look-up and one exchange.

    The whole KeyedJaggedTensor goes to the collection, which picks its features itself: permuting it here would take
    the collection out of TorchRec's pipeline. Tables pool by sum; mean pooling divides afterwards, because TorchRec's
    own mean divides twice where a row-wise table shares a collection with a table of another sharding.

    Two-layer tables (see `mlet.py`) are projected inside the collection, or, for comparison, after it.

    Attributes:
        projections: table name -> W2 (k, d), the second layer of each two-layer table; dense parameters.
    """

    def __init__(
        self,
        tables: list[Table],
        table_sets: list[TableSet],
        *,
        is_weighted: bool,
        project: str,
        train_projection: bool,
        device: torch.device,
    ):
        super().__init__()
        configs = [
            EmbeddingBagConfig(
                name=t.name,
                num_embeddings=t.num_rows,
                embedding_dim=t.width,
                feature_names=list(t.features),
                init_fn=_leave_as_allocated,
            )
            for t in tables
        ]
        factored = [t for t in tables if t.inner_dim is not None]
        self.projections = nn.ParameterDict(
            {t.name: nn.Parameter(torch.empty(t.width, t.dim), requires_grad=train_projection) for t in factored}
        )
        second_layers = dict(self.projections.items())
        if factored and project == "before":
            self.collection = FactoredCollection(configs, second_layers, is_weighted=is_weighted, device=device)
        else:
            self.collection = EmbeddingBagCollection(tables=configs, is_weighted=is_weighted, device=device)
        self.regroup = Regroup(tables, table_sets, second_layers, projects=project == "after")

    def forward(self, sparse: KeyedJaggedTensor) -> dict[str, Tensor]:
        """sparse: F features with B bags each. Returns set name -> (B, F, D) float32."""
        return self.regroup(self.collection(sparse), sparse)


class Regroup(nn.Module):
    """The collection's columns, regrouped into one (B, F, D) per table set, means divided by their bag's length."""

    def __init__(
        self,
        tables: list[Table],
        table_sets: list[TableSet],
        projections: Mapping[str, nn.Parameter],
        *,
        projects: bool,
    ):
        super().__init__()
        # the stage owns them; registered twice they would have two names
        self._second_layers = lambda: projections
        self._projects = projects
        names = output_names(tables)
        # set -> for each of its features: the output, its columns if it has those of other sets too, and the table
        self._sets: dict[str, list[_Source]] = {}
        self._mean: dict[str, list[str | None]] = {}
        for table_set in table_sets:
            owners = [next(t for t in tables if _serves(t, table_set, f)) for f in table_set.features]
            pairs = list(zip(owners, table_set.features, strict=True))
            self._sets[table_set.name] = [
                _Source(names[t.name, f], _columns(t, feature_of(table_set.name)), t.name) for t, f in pairs
            ]
            self._mean[table_set.name] = [f if t.pooling == "mean" else None for t, f in pairs]

    def forward(self, pooled: KeyedTensor, sparse: KeyedJaggedTensor) -> dict[str, Tensor]:
        """pooled: (B, sum of widths). sparse: the batch's own ids, for the bag lengths of mean-pooled features."""
        outputs, projections = pooled.to_dict(), self._second_layers()
        result = {}
        for name, sources in self._sets.items():
            served = [outputs[s.output] if s.columns is None else outputs[s.output][:, s.columns] for s in sources]
            if self._projects:
                pairs = zip(sources, served, strict=True)
                served = [x @ projections[s.table] if s.table in projections else x for s, x in pairs]
            stacked = torch.stack(served, dim=1)
            result[name] = self._divide(stacked, name, sparse) if any(self._mean[name]) else stacked
        return result

    def _divide(self, stacked: Tensor, name: str, sparse: KeyedJaggedTensor) -> Tensor:
        batch_size, keys = stacked.shape[0], sparse.keys()
        lengths = sparse.lengths().view(len(keys), batch_size)
        ones = torch.ones(batch_size, device=lengths.device, dtype=lengths.dtype)
        bags = [lengths[keys.index(f)].clamp(min=1) if f is not None else ones for f in self._mean[name]]
        return stacked / torch.stack(bags, dim=1).unsqueeze(2).to(stacked.dtype)


class _Source(NamedTuple):
    output: str
    columns: slice | None  # None: all of them
    table: str


def _serves(table: Table, table_set: TableSet, feature: str) -> bool:
    owner = feature_of(table_set.name)  # the sets of views are served by the tables of the set behind them
    return feature in table.features and any(b.table_set == owner for b in table.blocks)


def _columns(table: Table, table_set: str) -> slice | None:
    """Where a set's block lies in the columns of a table; None if the table has no other."""
    if len(table.blocks) == 1:
        return None
    at = [b.table_set for b in table.blocks].index(table_set)
    start = sum(b.width for b in table.blocks[:at])
    return slice(start, start + table.blocks[at].width)


def _leave_as_allocated(weight: Tensor) -> Tensor:
    """TorchRec's init hook. Tables are filled by `sharding.initialise`, once, the same for every sharding."""
    return weight
