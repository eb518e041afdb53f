"""DLRM: dot products of all pairs of features between a bottom and a top MLP.

Source: Naumov et al. 2019, arXiv 1906.00091. Letters: B rows, Nd dense columns, F sparse features, D width, T labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, TableSet
from dist_rec.data.schema import Schema
from dist_rec.nn.interaction import DotInteraction
from dist_rec.nn.mlp import MLP, dropout_problem, widths_problem
from dist_rec.settings import Complaint


@dataclass
class Config:
    """What `model:` takes with `name: dlrm`."""

    dim: int = 16  # D: width of every embedding, and of the bottom MLP's result
    bottom: list[int] = field(default_factory=lambda: [64])  # widths before the last layer, which has D; dense only
    top: list[int] = field(default_factory=lambda: [128, 64])  # widths before the logits
    dropout: float = 0.0  # probability of dropping a unit of the top MLP in training

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """One set, "main", of all sparse features."""
        return [TableSet("main", tuple(schema.sparse), self.dim)]

    def build(self, schema: Schema) -> DLRM:
        """The dense arch for `schema`, freshly initialised."""
        return DLRM(self, num_dense=len(schema.dense), num_sparse=len(schema.sparse), num_labels=len(schema.labels))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        if self.dim < 1:
            yield Complaint("dim", f"is {self.dim}; an embedding has at least one column")
        for key, problem in (
            ("bottom", widths_problem(self.bottom)),
            ("top", widths_problem(self.top, needed=True)),
            ("dropout", dropout_problem(self.dropout)),
        ):
            if problem:
                yield Complaint(key, problem)
        if len(schema.sparse) == 1 and not schema.dense:
            text = "is 'dlrm', which multiplies pairs of features, but the schema has one sparse feature and no dense"
            yield Complaint("name", f"{text} column; add a feature or choose 'dcn'")


class DLRM(nn.Module):
    """Bottom MLP, pairwise dots, top MLP; without dense columns there is no bottom.

    The dots are taken over the bottom's result and the F embeddings; the top reads them beside the bottom's result:
    D + F * (F + 1) / 2 columns, or F * (F - 1) / 2 without dense columns.
    Representations: "shared", the (B, top[-1]) input of the logits.
    """

    def __init__(self, config: Config, *, num_dense: int, num_sparse: int, num_labels: int) -> None:
        """An arch for Nd = `num_dense`, F = `num_sparse` and T = `num_labels`."""
        super().__init__()
        self.bottom = MLP(num_dense, [*config.bottom, config.dim]) if num_dense else None
        self.interaction = DotInteraction(num_sparse + bool(num_dense))
        width = self.interaction.out_width + (config.dim if num_dense else 0)
        self.top = MLP(width, config.top, dropout=config.dropout)
        self.head = nn.Linear(self.top.out_width, num_labels)
        self.representation_dims = {"shared": self.top.out_width}

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: {"main": (B, F, D)}. groups: unused. Returns logits (B, T) and "shared"."""
        if self.bottom is None:
            shared = self.top(self.interaction(tables["main"]))
        else:
            bottom = self.bottom(dense)
            dots = self.interaction(torch.cat([bottom.unsqueeze(1), tables["main"]], dim=1))
            shared = self.top(torch.cat([bottom, dots], dim=1))
        return ArchOutput(self.head(shared), {"shared": shared})
