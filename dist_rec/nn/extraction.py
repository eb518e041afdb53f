"""Extraction levels of PLE: experts of each domain, shared experts, and gates that mix them.

Source: Tang et al. 2020, "Progressive Layered Extraction (PLE)" (RecSys); with domains in place of tasks. Letters:
B rows, S domains, N columns in, d columns that an expert gives, k experts of each domain, m shared experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dist_rec.nn.domains import DomainLinear, DomainMLP, Domains
from dist_rec.nn.experts import Experts, mix


class Extraction(nn.Module):
    """The last level: a row's own domain gets a mixture of its own experts and the shared ones.

    Attributes:
        out_width: d.
    """

    def __init__(
        self, num_domains: int, in_width: int, widths: Sequence[int], *, own: int, shared: int, dropout: float
    ) -> None:
        """S, N, the widths of each expert, k = `own` and m = `shared`."""
        super().__init__()
        self.own = nn.ModuleList(DomainMLP(num_domains, in_width, widths, dropout=dropout) for _ in range(own))
        self.shared = Experts(shared, in_width, widths, dropout=dropout)
        self.gates = DomainLinear(num_domains, in_width, own + shared)
        self.out_width = self.shared.out_width

    def forward(self, own: Tensor, shared: Sequence[Tensor], domains: Domains) -> Tensor:
        """own: (B, N), what the experts and the gate of a row's domain read. shared: m tensors (B, N), what the shared
        experts read. Returns (B, d)."""
        experts = torch.stack([expert(own, domains) for expert in self.own], dim=1)
        return mix(torch.cat([experts, self.shared(shared)], dim=1), self.gates(own, domains))


class InnerExtraction(Extraction):
    """A level with another one after it: it goes on for every domain and for the shared experts, for all rows.

    The shared experts of the next level read a mixture of all experts of this one.
    """

    def __init__(
        self, num_domains: int, in_width: int, widths: Sequence[int], *, own: int, shared: int, dropout: float
    ) -> None:
        """As of the last level."""
        super().__init__(num_domains, in_width, widths, own=own, shared=shared, dropout=dropout)
        self.shared_gate = nn.Linear(in_width, num_domains * own + shared)

    def every(self, own: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
        """own: (S, B, N). shared: (B, N). Returns the same for the next level: (S, B, d) and (B, d)."""
        num_domains, batch_size, _ = own.shape
        experts = torch.stack([expert.every(own) for expert in self.own], dim=2)  # type: ignore[operator]
        common = self.shared([shared] * len(self.shared.experts))
        mine = torch.cat([experts, common.expand(num_domains, -1, -1, -1)], dim=2)
        mixed = mix(mine.flatten(0, 1), self.gates.every(own).flatten(0, 1))
        every = torch.cat([experts.transpose(0, 1).flatten(1, 2), common], dim=1)
        return mixed.unflatten(0, (num_domains, batch_size)), mix(every, self.shared_gate(shared))
