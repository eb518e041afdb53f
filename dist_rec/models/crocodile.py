"""Crocodile: several embedding sets, an expert on each, element-wise gates fed by prior embeddings, a tower per domain.

Source: Crocodile, arXiv 2405.12706. Its covariance loss, which keeps the experts apart, is the auxiliary `covariance`;
its per-domain loss is the objective `bce` with `mean_by`. Letters: B rows, Nd dense columns, F sparse features, P prior
features, D and Dp widths of embeddings, S domains, M experts and sets, T labels, N = Nd + F * D, d the width of an
expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

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
    """What `model:` takes with `name: crocodile`."""

    # sparse features whose own tables the gates read: in the paper the ids of user, item and domain. []: no such
    # tables, the gates read what the experts read
    prior: list[str]
    domain: str = "domain"  # group of the schema that says which domain a row belongs to; it needs num_ids
    dim: int = 16  # D: width of every embedding of an expert's set
    prior_dim: int = 16  # Dp: width of the prior embeddings
    num_experts: int = 2  # M: experts, and as many table sets unless there is a single one
    single_set: bool = False  # all experts read one table set, "main": the paper's ablation of multi-embedding
    experts: list[int] = field(default_factory=lambda: [128, 64])  # widths of each expert; the last is d
    # element: the gate weighs every expert in every one of the d columns (the paper's PEG). expert: a weight per expert
    gate: Literal["element", "expert"] = "element"
    towers: list[int] = field(default_factory=lambda: [64])  # widths of each tower, before the logits
    dropout: float = 0.0  # probability of dropping a unit of experts and towers in training

    def sets(self) -> list[str]:
        """The name of each expert's table set."""
        return ["main" if self.single_set else f"expert_{m}" for m in range(self.num_experts)]

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """A set of all sparse features for each expert, or one for all, and "prior"."""
        sets = [TableSet(name, tuple(schema.sparse), self.dim) for name in dict.fromkeys(self.sets())]
        return sets + ([TableSet("prior", tuple(self.prior), self.prior_dim)] if self.prior else [])

    def build(self, schema: Schema) -> Crocodile:
        """The dense arch for `schema`, freshly initialised."""
        width = len(schema.dense) + len(schema.sparse) * self.dim
        return Crocodile(self, width, schema.num_values(self.domain), len(schema.labels))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        return complain({
            "prior": schema.features_problem(self.prior),
            "domain": schema.group_problem(self.domain),
            "dim": size_problem(self.dim),
            "prior_dim": size_problem(self.prior_dim),
            "num_experts": size_problem(self.num_experts),
            "experts": widths_problem(self.experts, needed=True),
            "towers": widths_problem(self.towers),
            "dropout": dropout_problem(self.dropout),
        })  # fmt: skip


class Crocodile(nn.Module):
    """``tower_s(sum_m g_m * expert_m(x_m))`` with ``g = softmax_m(W_s r + b_s)``: x_m the dense columns beside the
    expert's set, r the prior embeddings, s the domain, * element-wise, the softmax over the M experts in each of the d
    columns.

    Every set and every expert is shared by all domains. Gradients reach the prior tables through the gates.

    Representations: "expert_0" ... "expert_<M-1>" and "shared", what the towers read: (B, d) each.
    """

    def __init__(self, config: Config, width: int, num_domains: int, num_labels: int) -> None:
        """An arch for N = `width`, S = `num_domains` and T = `num_labels`."""
        super().__init__()
        self.config, self.num_domains = config, num_domains
        self.mixture = DomainMixture(
            num_domains=num_domains,
            in_width=width,
            gate_width=len(config.prior) * config.prior_dim or width * len(set(config.sets())),
            num_experts=config.num_experts,
            experts=config.experts,
            elementwise=config.gate == "element",
            towers=config.towers,
            num_labels=num_labels,
            dropout=config.dropout,
        )
        self.representation_dims = self.mixture.representation_dims

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: the experts' sets -> (B, F, D), "prior" -> (B, P, Dp). groups: the domain, (B,).
        Returns logits (B, T)."""
        names = self.config.sets()
        of_set = {name: torch.cat([dense, tables[name].flatten(1)], dim=1) for name in dict.fromkeys(names)}
        r = tables["prior"].flatten(1) if self.config.prior else torch.cat(list(of_set.values()), dim=1)
        domains = Domains(groups[self.config.domain], self.num_domains)
        return ArchOutput(*self.mixture([of_set[name] for name in names], r, domains))
