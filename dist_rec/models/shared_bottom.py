"""Shared bottom: one MLP for all domains, a tower for each.

Source: Caruana 1997, "Multitask Learning"; with domains in place of tasks. Letters: B rows, Nd dense columns, F sparse
features, D width, S domains, T labels, N = Nd + F * D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, TableSet
from dist_rec.data.schema import Schema
from dist_rec.nn.domains import Domains, Towers
from dist_rec.nn.mlp import MLP, dropout_problem, size_problem, widths_problem
from dist_rec.settings import Complaint, complain


@dataclass
class Config:
    """What `model:` takes with `name: shared_bottom`."""

    domain: str = "domain"  # group of the schema that says which domain a row belongs to; it needs num_ids
    dim: int = 16  # D: width of every embedding
    bottom: list[int] = field(default_factory=lambda: [128, 64])  # widths of the shared MLP
    towers: list[int] = field(default_factory=lambda: [64])  # widths of each tower, before the logits
    dropout: float = 0.0  # probability of dropping a unit in training

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """One set, "main", of all sparse features."""
        return [TableSet("main", tuple(schema.sparse), self.dim)]

    def build(self, schema: Schema) -> SharedBottom:
        """The dense arch for `schema`, freshly initialised."""
        width = len(schema.dense) + len(schema.sparse) * self.dim
        return SharedBottom(self, width, schema.num_values(self.domain), len(schema.labels))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        return complain({
            "domain": schema.group_problem(self.domain),
            "dim": size_problem(self.dim),
            "bottom": widths_problem(self.bottom, needed=True),
            "towers": widths_problem(self.towers),
            "dropout": dropout_problem(self.dropout),
        })  # fmt: skip


class SharedBottom(nn.Module):
    """``tower_s(bottom(x))`` with x the dense columns beside all embeddings and s the row's domain.

    Representations: "shared", what the towers read: (B, bottom[-1]).
    """

    def __init__(self, config: Config, width: int, num_domains: int, num_labels: int) -> None:
        """An arch for N = `width`, S = `num_domains` and T = `num_labels`."""
        super().__init__()
        self.domain = config.domain
        self.bottom = MLP(width, config.bottom, dropout=config.dropout)
        shared = self.bottom.out_width
        self.towers = Towers(num_domains, shared, config.towers, num_labels, dropout=config.dropout)
        self.num_domains = num_domains
        self.representation_dims = {"shared": shared}

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: {"main": (B, F, D)}. groups: the domain, (B,). Returns logits (B, T) and "shared"."""
        domains = Domains(groups[self.domain], self.num_domains)
        shared = self.bottom(torch.cat([dense, tables["main"].flatten(1)], dim=1))
        return ArchOutput(self.towers(shared, domains), {"shared": shared})
