"""STEM: an embedding set and an expert for every domain and a shared one; all are read, only a row's own are trained.

Source: Su et al. 2024, "STEM: Unleashing the Power of Embeddings for Multi-task Recommendation", arXiv 2308.13537; with
domains in place of tasks. Letters: B rows, Nd dense columns, F sparse features, D width, S domains, T labels,
N = Nd + F * D, d the width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, TableSet
from dist_rec.data.schema import Schema
from dist_rec.nn.domains import DomainLinear, DomainMLP, Domains, Towers
from dist_rec.nn.experts import mix
from dist_rec.nn.mlp import MLP, dropout_problem, size_problem, widths_problem
from dist_rec.settings import Complaint, complain


@dataclass
class Config:
    """What `model:` takes with `name: stem`."""

    domain: str = "domain"  # group of the schema that says which domain a row belongs to; it needs num_ids
    dim: int = 16  # D: width of every embedding of every set
    experts: list[int] = field(default_factory=lambda: [128, 64])  # widths of each expert; the last is d
    towers: list[int] = field(default_factory=lambda: [64])  # widths of each tower, before the logits
    dropout: float = 0.0  # probability of dropping a unit of experts and towers in training

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """A set of all sparse features for all domains together, and one for each."""
        names = ["shared", *(f"domain_{s}" for s in range(schema.num_values(self.domain)))]
        return [TableSet(name, tuple(schema.sparse), self.dim) for name in names]

    def build(self, schema: Schema) -> STEM:
        """The dense arch for `schema`, freshly initialised."""
        return STEM(self, schema, schema.num_values(self.domain))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        return complain({
            "domain": schema.group_problem(self.domain),
            "dim": size_problem(self.dim),
            "experts": widths_problem(self.experts, needed=True),
            "towers": widths_problem(self.towers),
            "dropout": dropout_problem(self.dropout),
        })  # fmt: skip


class STEM(nn.Module):
    """``tower_s(sum_m softmax(W_s [x, e_s + e_shared] + b_s)_m O_m)`` for a row of domain s, with x the dense columns
    and e the embeddings of a set: O_0 is the shared expert on the shared set, O_{r+1} the expert of domain r on set r.

    "All forward, task-specific backward": of the experts of domains no gradient flows but to the row's own.

    Representations: "expert_0" ... "expert_<S>", the O, and "shared", what the towers read: (B, d) each.
    """

    def __init__(self, config: Config, schema: Schema, num_domains: int) -> None:
        """An arch for S = `num_domains`."""
        super().__init__()
        self.domain, self.num_domains = config.domain, num_domains
        width = len(schema.dense) + len(schema.sparse) * config.dim
        self.shared = MLP(width, config.experts, dropout=config.dropout)
        self.experts = DomainMLP(num_domains, width, config.experts, dropout=config.dropout)
        self.gates = DomainLinear(num_domains, width, num_domains + 1)
        d = self.shared.out_width
        self.towers = Towers(num_domains, d, config.towers, len(schema.labels), dropout=config.dropout)
        self.names = [f"expert_{m}" for m in range(num_domains + 1)]
        self.representation_dims = dict.fromkeys([*self.names, "shared"], d)

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: "shared" and "domain_<s>" -> (B, F, D). groups: the domain, (B,). Returns logits
        (B, T)."""
        domains = Domains(groups[self.domain], self.num_domains)
        shared = tables["shared"].flatten(1)
        sets = torch.stack([tables[f"domain_{s}"].flatten(1) for s in range(self.num_domains)], dim=1)
        own = domains.pick(sets)
        experts = torch.cat(
            [
                self.shared(torch.cat([dense, shared], dim=1)).unsqueeze(1),
                self._of_domains(dense, sets, torch.cat([dense, own], dim=1), domains),
            ],
            dim=1,
        )
        mixed = mix(experts, self.gates(torch.cat([dense, own + shared], dim=1), domains))
        named = dict(zip(self.names, experts.unbind(1), strict=True))
        return ArchOutput(self.towers(mixed, domains), {**named, "shared": mixed})

    def _of_domains(self, dense: Tensor, sets: Tensor, own: Tensor, domains: Domains) -> Tensor:
        """sets: (B, S, F * D). own: (B, N). Returns (B, S, d): the row's own domain's expert with a gradient, the
        others without."""
        mine = self.experts(own, domains).unsqueeze(1)
        with torch.no_grad():
            inputs = torch.cat([dense.unsqueeze(1).expand(-1, self.num_domains, -1), sets], dim=2)
            others = self.experts.every(inputs.transpose(0, 1)).transpose(0, 1)
            is_mine = nn.functional.one_hot(domains.index, self.num_domains).bool().unsqueeze(2)
        return torch.where(is_mine, mine, others)
