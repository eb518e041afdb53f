"""ME-PLE: PLE in which every expert has an embedding set of its own: each domain's expert, and each shared one.

Sources: Tang et al. 2020 (PLE); Guo et al. 2024, arXiv 2310.04400 (multi-embedding); a baseline of Crocodile, arXiv
2405.12706, which shows how the sets of small domains starve. Letters: B rows, Nd dense columns, F sparse features,
D width, S domains, T labels, N = Nd + F * D, d the width of an expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, TableSet
from dist_rec.data.schema import Schema
from dist_rec.nn.domains import Domains, Towers
from dist_rec.nn.extraction import Extraction
from dist_rec.nn.mlp import dropout_problem, size_problem, widths_problem
from dist_rec.settings import Complaint, complain


@dataclass
class Config:
    """What `model:` takes with `name: me_ple`."""

    domain: str = "domain"  # group of the schema that says which domain a row belongs to; it needs num_ids
    dim: int = 16  # D: width of every embedding of every set
    shared: int = 1  # shared experts, and as many shared table sets; every domain has one more of each
    experts: list[int] = field(default_factory=lambda: [128, 64])  # widths of each expert; the last is d
    towers: list[int] = field(default_factory=lambda: [64])  # widths of each tower, before the logits
    dropout: float = 0.0  # probability of dropping a unit of experts and towers in training

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """A set of all sparse features for each shared expert and for each domain."""
        names = [f"shared_{m}" for m in range(self.shared)]
        names += [f"domain_{s}" for s in range(schema.num_values(self.domain))]
        return [TableSet(name, tuple(schema.sparse), self.dim) for name in names]

    def build(self, schema: Schema) -> MEPLE:
        """The dense arch for `schema`, freshly initialised."""
        width = len(schema.dense) + len(schema.sparse) * self.dim
        return MEPLE(self, width, schema.num_values(self.domain), len(schema.labels))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        return complain({
            "domain": schema.group_problem(self.domain),
            "dim": size_problem(self.dim),
            "shared": size_problem(self.shared),
            "experts": widths_problem(self.experts, needed=True),
            "towers": widths_problem(self.towers),
            "dropout": dropout_problem(self.dropout),
        })  # fmt: skip


class MEPLE(nn.Module):
    """``tower_s(t_s)``, t_s a mixture of the expert of the row's domain s on set s and of the shared experts on theirs;
    the gate reads set s. One extraction level: the experts of a second one would have no embeddings to read.

    Every set is looked up for every row, but a domain's set learns from that domain's rows alone.

    Representations: "shared", what the towers read: (B, d).
    """

    def __init__(self, config: Config, width: int, num_domains: int, num_labels: int) -> None:
        """An arch for N = `width`, S = `num_domains` and T = `num_labels`."""
        super().__init__()
        self.config, self.num_domains = config, num_domains
        shared, dropout = config.shared, config.dropout
        self.extraction = Extraction(num_domains, width, config.experts, own=1, shared=shared, dropout=dropout)
        d = self.extraction.out_width
        self.towers = Towers(num_domains, d, config.towers, num_labels, dropout=dropout)
        self.representation_dims = {"shared": d}

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: "shared_<m>" and "domain_<s>" -> (B, F, D). groups: the domain, (B,). Returns logits
        (B, T) and "shared"."""
        domains = Domains(groups[self.config.domain], self.num_domains)
        sets = torch.stack([tables[f"domain_{s}"].flatten(1) for s in range(self.num_domains)], dim=1)
        own = torch.cat([dense, domains.pick(sets)], dim=1)
        shared = [tables[f"shared_{m}"].flatten(1) for m in range(self.config.shared)]
        mixed = self.extraction(own, [torch.cat([dense, x], dim=1) for x in shared], domains)
        return ArchOutput(self.towers(mixed, domains), {"shared": mixed})
