"""Parameters per domain: every row of a batch uses those of its own domain.

Letters: B rows, S domains, N columns in, H columns out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn


class Domains:
    """Which domain each row of a batch belongs to; made once per step, for all layers with parameters per domain.

    A linear map per domain costs as much as one for all on CPU, where rows are sorted by domain and each domain's are
    multiplied together. That needs the domains' sizes, for which a GPU would have to be waited for: there every row
    goes through the S maps in one product, and its own result is picked.

    Attributes:
        domain: (B,) int64, -1 in padding rows.
        index: (B,) int64 in 0..S-1. A padding row goes with domain 0; its weight of 0 makes it count for nothing.
        number: S.
    """

    def __init__(self, domain: Tensor, number: int) -> None:
        """domain: (B,) int64, a group of the batch whose `num_ids` the schema declares; number: S."""
        self.domain = domain
        self.index = domain.clamp(min=0)
        self.number = number

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x: (B, N). weight: (S, H, N). bias: (S, H). Returns (B, H): row b is ``weight[s] @ x[b] + bias[s]``, s its
        domain."""
        if x.device.type == "cpu":
            return self._by_sorting(x, weight, bias)
        return self._by_picking(x, weight, bias)

    def pick(self, values: Tensor) -> Tensor:
        """values: (B, S, H). Returns (B, H), of each row the values of its own domain."""
        index = self.index.view(-1, 1, 1).expand(-1, 1, values.shape[2])
        return values.gather(1, index).squeeze(1)

    def one_hot(self) -> Tensor:
        """(B, S) float32, 0 in all columns of a padding row."""
        numbers = torch.arange(self.number, device=self.domain.device)
        return (self.domain.unsqueeze(1) == numbers).float()

    def _by_sorting(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        order, back, sizes = self._order
        # unbind, not indexing: the gradient of S index operations would be S tensors of the size of `weight`
        parts = zip(x[order].split(sizes), weight.unbind(), bias.unbind(), strict=True)
        return torch.cat([nn.functional.linear(part, w, b) for part, w, b in parts])[back]

    def _by_picking(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        every = nn.functional.linear(x, weight.flatten(0, 1), bias.flatten())
        return self.pick(every.unflatten(1, (self.number, -1)))

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor, list[int]]:
        """The rows by domain, the way back, and how many each domain has."""
        order = torch.argsort(self.index, stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        sizes = torch.bincount(self.index, minlength=self.number).tolist()
        if len(sizes) > self.number:
            text = f"domain {len(sizes) - 1} is outside 0..{self.number - 1}"
            raise IndexError(f"{text}; the loader keeps it out where the schema's group has num_ids")
        return order, back, sizes


class DomainLinear(nn.Module):
    """A linear layer per domain, each initialised as `nn.Linear` is.

    Attributes:
        weight: (S, H, N). bias: (S, H).
    """

    def __init__(self, num_domains: int, in_width: int, out_width: int) -> None:
        """S = `num_domains`, N = `in_width`, H = `out_width`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_domains, out_width, in_width))
        self.bias = nn.Parameter(torch.empty(num_domains, out_width))
        for weight in self.weight:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        nn.init.uniform_(self.bias, -(in_width**-0.5), in_width**-0.5)

    def forward(self, x: Tensor, domains: Domains) -> Tensor:
        """x: (B, N). Returns (B, H), each row by its own domain's layer."""
        return domains.linear(x, self.weight, self.bias)

    def every(self, x: Tensor) -> Tensor:
        """x: (S, B, N). Returns (S, B, H): every domain's layer on an input of its own, for all rows."""
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.mT)


class DomainMLP(nn.Module):
    """An MLP per domain: linear, ReLU and dropout, once per width.

    Attributes:
        out_width: width of the result: the last of `widths`, or `in_width` if there are none.
    """

    def __init__(self, num_domains: int, in_width: int, widths: Sequence[int], *, dropout: float = 0.0) -> None:
        """S = `num_domains` MLPs from `in_width` through `widths`."""
        super().__init__()
        sizes = zip([in_width, *widths], widths, strict=False)
        self.layers: Any = nn.ModuleList(DomainLinear(num_domains, fan_in, fan_out) for fan_in, fan_out in sizes)
        self.dropout = nn.Dropout(dropout)
        self.out_width = widths[-1] if widths else in_width

    def forward(self, x: Tensor, domains: Domains) -> Tensor:
        """x: (B, N). Returns (B, out_width), each row by its own domain's MLP."""
        for layer in self.layers:
            x = self.dropout(torch.relu(layer(x, domains)))
        return x

    def every(self, x: Tensor) -> Tensor:
        """x: (S, B, N). Returns (S, B, out_width): every domain's MLP on an input of its own, for all rows."""
        for layer in self.layers:
            x = self.dropout(torch.relu(layer.every(x)))
        return x


class Towers(nn.Module):
    """A tower per domain: an MLP and a linear layer to the logits of all labels."""

    def __init__(
        self, num_domains: int, in_width: int, widths: Sequence[int], num_labels: int, *, dropout: float = 0.0
    ) -> None:
        """S = `num_domains` towers from `in_width` through `widths` to T = `num_labels`."""
        super().__init__()
        self.deep = DomainMLP(num_domains, in_width, widths, dropout=dropout)
        self.head = DomainLinear(num_domains, self.deep.out_width, num_labels)

    def forward(self, x: Tensor, domains: Domains) -> Tensor:
        """x: (B, N). Returns logits (B, T), each row by its own domain's tower."""
        return self.head(self.deep(x, domains), domains)
