"""MMoE: experts over one embedding set, and for every domain a gate that mixes them and a tower.

Source: Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts" (KDD);
with domains in place of tasks. Letters: B rows, Nd dense columns, F sparse features, D width, S domains, M experts,
T labels, N = Nd + F * D, d the width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, TableSet
from dist_rec.data.schema import Schema
from dist_rec.nn.domains import Domains
from dist_rec.nn.experts import DomainMixture
from dist_rec.nn.mlp import dropout_problem, size_problem, widths_problem
from dist_rec.settings import Complaint, complain


@dataclass
class Config:
    """What `model:` takes with `name: mmoe`."""

    domain: str = "domain"  # group of the schema that says which domain a row belongs to; it needs num_ids
    dim: int = 16  # D: width of every embedding
    num_experts: int = 4  # M
    experts: list[int] = field(default_factory=lambda: [128, 64])  # widths of each expert; the last is d
    towers: list[int] = field(default_factory=lambda: [64])  # widths of each tower, before the logits
    dropout: float = 0.0  # probability of dropping a unit of experts and towers in training

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """One set, "main", of all sparse features."""
        return [TableSet("main", tuple(schema.sparse), self.dim)]

    def build(self, schema: Schema) -> MMoE:
        """The dense arch for `schema`, freshly initialised."""
        width = len(schema.dense) + len(schema.sparse) * self.dim
        return MMoE(self, width, schema.num_values(self.domain), len(schema.labels))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        return complain({
            "domain": schema.group_problem(self.domain),
            "dim": size_problem(self.dim),
            "num_experts": size_problem(self.num_experts),
            "experts": widths_problem(self.experts, needed=True),
            "towers": widths_problem(self.towers),
            "dropout": dropout_problem(self.dropout),
        })  # fmt: skip


class MMoE(nn.Module):
    """``tower_s(sum_m softmax(W_s x + b_s)_m expert_m(x))``, x the dense columns beside all embeddings, s the domain.

    Representations: "expert_0" ... "expert_<M-1>" and "shared", what the towers read: (B, d) each.
    """

    def __init__(self, config: Config, width: int, num_domains: int, num_labels: int) -> None:
        """An arch for N = `width`, S = `num_domains` and T = `num_labels`."""
        super().__init__()
        self.config, self.num_domains = config, num_domains
        self.mixture = DomainMixture(
            num_domains=num_domains,
            in_width=width,
            gate_width=width,
            num_experts=config.num_experts,
            experts=config.experts,
            elementwise=False,
            towers=config.towers,
            num_labels=num_labels,
            dropout=config.dropout,
        )
        self.representation_dims = self.mixture.representation_dims

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: {"main": (B, F, D)}. groups: the domain, (B,). Returns logits (B, T)."""
        x = torch.cat([dense, tables["main"].flatten(1)], dim=1)
        domains = Domains(groups[self.config.domain], self.num_domains)
        return ArchOutput(*self.mixture([x] * self.config.num_experts, x, domains))
