"""Two towers: a query and an item, each encoded by itself, compared by an inner product.

Source: Yao et al. 2021, arXiv 2007.12865, section 2 (the two-tower network of equation 11). Letters: B rows, Nd dense
columns, F sparse features of a tower, D width of an embedding, V width of a tower's vector.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, EvaluationKind, TableSet
from dist_rec.data.batch import Batch
from dist_rec.data.schema import Schema
from dist_rec.data.views import view_key
from dist_rec.nn.mlp import MLP, dropout_problem, widths_problem
from dist_rec.settings import Complaint


@dataclass
class Config:
    """What `model:` takes with `name: two_tower`."""

    evaluation: ClassVar[EvaluationKind] = "retrieval"
    serves_views: ClassVar[bool] = True

    dim: int = 32  # D: width of every embedding
    # sparse features and dense columns of the query; default: all that do not describe the row's item
    query: list[str] | None = None
    # of the item: some of schema.items.feature and what is joined by it; default: all of these
    item: list[str] | None = None
    layers: list[int] = field(default_factory=lambda: [128, 64])  # widths of each tower; the last is V, without ReLU
    dropout: float = 0.0  # probability of dropping a unit of the hidden layers in training
    # shared: features of both towers that name the same table share it. separate: each tower has tables of its own
    tables: Literal["shared", "separate"] = "shared"
    similarity: Literal["cosine", "dot"] = "cosine"  # cosine: vectors have length 1
    tower: Literal["both", "query", "item"] = "both"  # an export has each tower by itself; training needs both

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """ "main" of all features, the query's first; with separate tables "query" and "item"."""
        towers = {t: tuple(n for n in names if n in schema.sparse) for t, names in self.inputs(schema).items()}
        if self.tables == "shared":
            return [TableSet("main", sum(towers.values(), ()), self.dim)]
        return [TableSet(tower, features, self.dim) for tower, features in towers.items()]

    def build(self, schema: Schema) -> TwoTower:
        """The dense arch for `schema`, freshly initialised."""
        return TwoTower(self, schema)

    def parts(self) -> dict[str, Config]:
        """Each tower by itself, as it is exported."""
        return {"query": replace(self, tower="query"), "item": replace(self, tower="item")}

    def reads(self, schema: Schema) -> list[str]:
        """The features and dense columns of the towers that are there."""
        return [name for names in self.inputs(schema).values() for name in names]

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        if schema.items is None:
            yield Complaint("name", "is 'two_tower', which needs an item table; declare schema.items, set data.items")
            return
        if schema.labels:
            text = "is 'two_tower', for which every row is a positive pair, but the schema has labels"
            yield Complaint("name", f"{text}; write labels: {{}}, and to leave rows out give them weight 0")
        if self.dim < 1:
            yield Complaint("dim", f"is {self.dim}; an embedding has at least one column")
        for key, problem in (
            ("layers", widths_problem(self.layers, needed=True)),
            ("dropout", dropout_problem(self.dropout)),
        ):
            if problem:
                yield Complaint(key, problem)
        yield from self._check_inputs(schema)

    def _check_inputs(self, schema: Schema) -> Iterator[Complaint]:
        assert schema.items is not None
        of_item, known = _of_item(schema), [*schema.sparse, *schema.dense]
        for key, names in (("query", self.query), ("item", self.item)):
            for name in names or ():
                if name not in known:
                    yield Complaint(key, f"names '{name}', which is no feature; known: {', '.join(known)}")
                elif (name in of_item) != (key == "item"):
                    what = "describes the item" if name in of_item else "is not known from the item alone"
                    text = f"names '{name}', which {what}; an item's features are {schema.items.feature} and those"
                    yield Complaint(key, f"{text} with join: {schema.items.feature}")
        for key, names in self.inputs(schema).items():
            asked = self.query if key == "query" else self.item
            if not any(name in schema.sparse for name in names) and set(asked or ()) <= set(known):
                yield Complaint(key, "has no sparse feature; a tower needs at least one")

    def inputs(self, schema: Schema) -> dict[str, list[str]]:
        """Tower -> its features and dense columns, in the schema's order."""
        of_item, known = _of_item(schema), [*schema.sparse, *schema.dense]
        found = {
            "query": [n for n in known if (n not in of_item if self.query is None else n in self.query)],
            "item": [n for n in known if (n in of_item if self.item is None else n in self.item)],
        }
        return {tower: names for tower, names in found.items() if self.tower in ("both", tower)}


def _of_item(schema: Schema) -> set[str]:
    """What an item alone decides: sparse features and dense columns."""
    if schema.items is None:
        return set()
    dense = {name for name, column in schema.dense.items() if column.join == schema.items.feature}
    return dense | set(schema.item_features())


class TwoTower(nn.Module):
    """Two MLPs over the towers' embeddings and dense columns; predictions have no columns.

    Representations: "query" and "item", both (B, V); of an export with one tower, that one.
    """

    def __init__(self, config: Config, schema: Schema) -> None:
        """The towers of `config` for the columns of `schema`."""
        super().__init__()
        self._shared = config.tables == "shared"
        self._cosine = config.similarity == "cosine"
        inputs = config.inputs(schema)
        self._sparse = {tower: sum(name in schema.sparse for name in names) for tower, names in inputs.items()}
        self._dense = {t: [i for i, name in enumerate(schema.dense) if name in names] for t, names in inputs.items()}
        for tower in inputs:
            self.add_module(tower, _tower(config.dim * self._sparse[tower] + len(self._dense[tower]), config))
        self.representation_dims = dict.fromkeys(inputs, config.layers[-1])

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: {"main": (B, F, D)} or {"query": ..., "item": ...}. groups: unused."""
        rows = tables
        if self._shared:
            rows = dict(zip(self._sparse, tables["main"].split(list(self._sparse.values()), dim=1), strict=True))
        vectors = {tower: self._encoded(tower, rows[tower], dense) for tower in self._sparse}
        return ArchOutput(dense.new_empty(len(dense), 0), vectors)

    def encode(self, batch: Batch, tables: Mapping[str, Tensor], view: str) -> Tensor:
        """(B, V): the items of a view."""
        rows = tables[view_key("main" if self._shared else "item", view)]
        return self._encoded("item", rows, batch.view_dense[view])

    def _encoded(self, tower: str, rows: Tensor, dense: Tensor) -> Tensor:
        """rows: (B, F, D) of the tower's features. dense: (B, Nd) of all columns."""
        parts = [rows.flatten(1)] + ([dense[:, self._dense[tower]]] if self._dense[tower] else [])
        vectors = self.get_submodule(tower)(torch.cat(parts, dim=1))
        return nn.functional.normalize(vectors.float(), dim=1) if self._cosine else vectors


def _tower(width: int, config: Config) -> nn.Sequential:
    hidden = MLP(width, config.layers[:-1], dropout=config.dropout)
    return nn.Sequential(hidden, nn.Linear(hidden.out_width, config.layers[-1]))
