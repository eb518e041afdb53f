"""Banks of experts, and gates that mix or scale what they give.

Letters: B rows, S domains, M experts, N columns in, d columns that an expert gives, T labels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from dist_rec.nn.domains import DomainLinear, Domains, Towers
from dist_rec.nn.mlp import MLP


class Experts(nn.Module):
    """M MLPs of one shape.

    Attributes:
        out_width: d.
    """

    def __init__(self, number: int, in_width: int, widths: Sequence[int], *, dropout: float = 0.0) -> None:
        """M = `number` MLPs from N = `in_width` through `widths`."""
        super().__init__()
        self.experts = nn.ModuleList(MLP(in_width, widths, dropout=dropout) for _ in range(number))
        self.out_width = widths[-1] if widths else in_width

    def forward(self, inputs: Iterable[Tensor]) -> Tensor:
        """inputs: M tensors (B, N), one for each expert (one M times where they share it). Returns (B, M, d)."""
        return torch.stack([expert(x) for expert, x in zip(self.experts, inputs, strict=True)], dim=1)


def mix(experts: Tensor, logits: Tensor) -> Tensor:
    """``sum_m softmax_m(logits) * experts``: the softmax is over the M experts.

    Args:
        experts: (B, M, d).
        logits: (B, M), a weight for each expert (MMoE); or (B, M, d), a weight for each expert and column (the
            element-wise gate of Crocodile, arXiv 2405.12706).

    Returns (B, d).
    """
    weights = torch.softmax(logits, dim=1)
    return ((weights if weights.dim() == 3 else weights.unsqueeze(2)) * experts).sum(dim=1)


class DomainMixture(nn.Module):
    """``tower_s(mix(experts, W_s r + b_s))``: for every domain s a gate that mixes the experts, and a tower.

    Attributes:
        representation_dims: "expert_0" ... "expert_<M-1>" and "shared", what the towers read: d each.
    """

    def __init__(
        self,
        *,
        num_domains: int,
        in_width: int,
        gate_width: int,
        num_experts: int,
        experts: Sequence[int],
        elementwise: bool,
        towers: Sequence[int],
        num_labels: int,
        dropout: float,
    ) -> None:
        """S, N, columns of r, M and T; the widths of each expert and of each tower; the kind of gate as in `mix`."""
        super().__init__()
        self.experts = Experts(num_experts, in_width, experts, dropout=dropout)
        d = self.experts.out_width
        self.elementwise = elementwise
        self.gates = DomainLinear(num_domains, gate_width, num_experts * (d if elementwise else 1))
        self.towers = Towers(num_domains, d, towers, num_labels, dropout=dropout)
        self._names = [f"expert_{m}" for m in range(num_experts)]
        self.representation_dims = dict.fromkeys([*self._names, "shared"], d)

    def forward(self, inputs: Iterable[Tensor], r: Tensor, domains: Domains) -> tuple[Tensor, dict[str, Tensor]]:
        """inputs: M tensors (B, N), one for each expert. r: (B, gate_width). Returns logits (B, T), representations."""
        experts = self.experts(inputs)
        logits = self.gates(r, domains)
        shared = mix(experts, logits.unflatten(1, experts.shape[1:]) if self.elementwise else logits)
        named = dict(zip(self._names, experts.unbind(1), strict=True))
        return self.towers(shared, domains), {**named, "shared": shared}


class GateUnit(nn.Module):
    """``2 * sigmoid(W' relu(W x + b) + b')``: factors in (0, 2) by which something else is scaled.

    Source: Chang et al. 2023 (PEPNet), arXiv 2302.01115, "Gate NU".
    """

    def __init__(self, in_width: int, hidden: int, out_width: int) -> None:
        """From N = `in_width` through `hidden` to `out_width` factors."""
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(in_width, hidden), nn.ReLU(), nn.Linear(hidden, out_width), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N). Returns (B, out_width)."""
        return 2 * self.layers(x)
