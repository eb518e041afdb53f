"""PLE: levels of experts of each domain beside shared ones, mixed by gates; a tower per domain.

Source: Tang et al. 2020, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model for Personalized
Recommendations" (RecSys); with domains in place of tasks. Letters: B rows, Nd dense columns, F sparse features,
D width, S domains, T labels, N = Nd + F * D, d the width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, TableSet
from dist_rec.data.schema import Schema
from dist_rec.nn.domains import Domains, Towers
from dist_rec.nn.extraction import Extraction, InnerExtraction
from dist_rec.nn.mlp import dropout_problem, size_problem, widths_problem
from dist_rec.settings import Complaint, complain


@dataclass
class Config:
    """What `model:` takes with `name: ple`."""

    domain: str = "domain"  # group of the schema that says which domain a row belongs to; it needs num_ids
    dim: int = 16  # D: width of every embedding
    levels: int = 2  # extraction levels; 1 is CGC. All but the last compute the experts of all domains for every row
    own: int = 1  # experts of each domain, in every level
    shared: int = 1  # shared experts, in every level
    experts: list[int] = field(default_factory=lambda: [128, 64])  # widths of each expert; the last is d
    towers: list[int] = field(default_factory=lambda: [64])  # widths of each tower, before the logits
    dropout: float = 0.0  # probability of dropping a unit of experts and towers in training

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """One set, "main", of all sparse features."""
        return [TableSet("main", tuple(schema.sparse), self.dim)]

    def build(self, schema: Schema) -> PLE:
        """The dense arch for `schema`, freshly initialised."""
        width = len(schema.dense) + len(schema.sparse) * self.dim
        return PLE(self, width, schema.num_values(self.domain), len(schema.labels))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        return complain({
            "domain": schema.group_problem(self.domain),
            "dim": size_problem(self.dim),
            "levels": size_problem(self.levels),
            "own": size_problem(self.own),
            "shared": size_problem(self.shared),
            "experts": widths_problem(self.experts, needed=True),
            "towers": widths_problem(self.towers),
            "dropout": dropout_problem(self.dropout),
        })  # fmt: skip


class PLE(nn.Module):
    """``tower_s(t_s)``, t_s the last level's mixture for the row's domain s; the first level reads the dense columns
    beside all embeddings.

    Representations: "shared", what the towers read: (B, d).
    """

    def __init__(self, config: Config, width: int, num_domains: int, num_labels: int) -> None:
        """An arch for N = `width`, S = `num_domains` and T = `num_labels`."""
        super().__init__()
        self.config, self.num_domains = config, num_domains
        kinds = [InnerExtraction] * (config.levels - 1) + [Extraction]
        widths = [width] + [config.experts[-1]] * (config.levels - 1)
        own, shared, dropout = config.own, config.shared, config.dropout
        self.levels: Any = nn.ModuleList(
            kind(num_domains, w, config.experts, own=own, shared=shared, dropout=dropout)
            for kind, w in zip(kinds, widths, strict=True)
        )
        d = config.experts[-1]
        self.towers = Towers(num_domains, d, config.towers, num_labels, dropout=dropout)
        self.representation_dims = {"shared": d}

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: {"main": (B, F, D)}. groups: the domain, (B,). Returns logits (B, T) and "shared"."""
        domains = Domains(groups[self.config.domain], self.num_domains)
        own = shared = torch.cat([dense, tables["main"].flatten(1)], dim=1)
        *inner, last = self.levels
        if inner:
            every = own.expand(self.num_domains, -1, -1)
            for level in inner:
                every, shared = level.every(every, shared)
            own = domains.pick(every.transpose(0, 1))
        mixed = last(own, [shared] * self.config.shared, domains)
        return ArchOutput(self.towers(mixed, domains), {"shared": mixed})
