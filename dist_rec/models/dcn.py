"""DCN-V2: explicit feature crosses of bounded degree, before or beside a deep MLP.

Source: Wang et al. 2021, arXiv 2008.13535. Letters: B rows, Nd dense columns, F sparse features, D width, T labels,
N = Nd + F * D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, TableSet
from dist_rec.data.schema import Schema
from dist_rec.nn.cross import cross_network
from dist_rec.nn.mlp import MLP, dropout_problem, widths_problem
from dist_rec.settings import Complaint


@dataclass
class Config:
    """What `model:` takes with `name: dcn`."""

    dim: int = 16  # D: width of every embedding
    structure: Literal["stacked", "parallel"] = "stacked"  # the deep MLP reads the crosses, or x0 beside them
    cross_layers: int = 2
    rank: int | None = None  # of the cross matrices; nothing: full N x N. Saves work below N / 2
    deep: list[int] = field(default_factory=lambda: [128, 64])  # widths of the deep MLP
    dropout: float = 0.0  # probability of dropping a unit of the deep MLP in training

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """One set, "main", of all sparse features."""
        return [TableSet("main", tuple(schema.sparse), self.dim)]

    def build(self, schema: Schema) -> DCN:
        """The dense arch for `schema`, freshly initialised."""
        return DCN(self, width=self._width(schema), num_labels=len(schema.labels))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        if self.dim < 1:
            yield Complaint("dim", f"is {self.dim}; an embedding has at least one column")
        if self.cross_layers < 1:
            yield Complaint("cross_layers", f"is {self.cross_layers}; a DCN needs at least one cross layer")
        if self.rank is not None and not 1 <= self.rank < self._width(schema):
            width = f"N = {self._width(schema)} (dense columns + sparse features * dim)"
            yield Complaint("rank", f"is {self.rank}; use 1 to N - 1 with {width}, or leave it out for full matrices")
        for key, problem in (
            ("deep", widths_problem(self.deep, needed=True)),
            ("dropout", dropout_problem(self.dropout)),
        ):
            if problem:
                yield Complaint(key, problem)

    def _width(self, schema: Schema) -> int:
        return len(schema.dense) + len(schema.sparse) * self.dim


class DCN(nn.Module):
    """Cross network and deep MLP over x0, the dense columns beside all embeddings.

    Stacked: logits of deep(cross(x0)). Parallel: logits of [cross(x0), deep(x0)].
    Representations: "shared", the input of the logits: (B, deep[-1]) stacked, (B, N + deep[-1]) parallel.
    """

    def __init__(self, config: Config, *, width: int, num_labels: int) -> None:
        """An arch for N = `width` and T = `num_labels`."""
        super().__init__()
        self.parallel = config.structure == "parallel"
        self.cross = cross_network(width, config.cross_layers, config.rank)
        self.deep = MLP(width, config.deep, dropout=config.dropout)
        shared = self.deep.out_width + (width if self.parallel else 0)
        self.head = nn.Linear(shared, num_labels)
        self.representation_dims = {"shared": shared}

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: {"main": (B, F, D)}. groups: unused. Returns logits (B, T) and "shared"."""
        x0 = torch.cat([dense, tables["main"].flatten(1)], dim=1)
        crossed = self.cross(x0)
        shared = torch.cat([crossed, self.deep(x0)], dim=1) if self.parallel else self.deep(crossed)
        return ArchOutput(self.head(shared), {"shared": shared})
