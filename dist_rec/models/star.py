"""STAR: layers whose weights are a shared matrix times one of the row's domain, normalisation by domain.

Source: Sheng et al. 2021, "One Model to Serve All: Star Topology Adaptive Recommender for Multi-Domain CTR Prediction",
arXiv 2101.11427. Letters: B rows, Nd dense columns, F sparse features, D width, S domains, T labels, N = Nd + F * D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, TableSet
from dist_rec.data.schema import Schema
from dist_rec.nn.collectives import sum_over_ranks, total
from dist_rec.nn.domains import Domains
from dist_rec.nn.mlp import MLP, dropout_problem, size_problem, widths_problem
from dist_rec.settings import Complaint, complain

_MOMENTUM = 0.1  # least weight of a step in the running statistics, as in torch's batch normalisation
_EPS = 1e-5
_CONSTANT = 1e-10  # a variance of at most this share of mean^2 + 1e-6 _EPS is float32's rounding, or nothing beside eps


@dataclass
class Config:
    """What `model:` takes with `name: star`."""

    domain: str = "domain"  # group of the schema that says which domain a row belongs to; it needs num_ids
    dim: int = 16  # D: width of every embedding, and of the domain's in the auxiliary network
    widths: list[int] = field(default_factory=lambda: [128, 64])  # of the star topology's layers, before the logits
    auxiliary: list[int] = field(default_factory=lambda: [64])  # widths of the auxiliary network, before the logits
    # partitioned normalisation: by the mean and variance of the row's domain, in training those of the batch of all
    # ranks. A domain needs several rows in most batches for it to work
    normalize: bool = True
    dropout: float = 0.0  # probability of dropping a unit in training

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """One set, "main", of all sparse features."""
        return [TableSet("main", tuple(schema.sparse), self.dim)]

    def build(self, schema: Schema) -> STAR:
        """The dense arch for `schema`, freshly initialised."""
        width = len(schema.dense) + len(schema.sparse) * self.dim
        return STAR(self, width, schema.num_values(self.domain), len(schema.labels))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        return complain({
            "domain": schema.group_problem(self.domain),
            "dim": size_problem(self.dim),
            "widths": widths_problem(self.widths, needed=True),
            "auxiliary": widths_problem(self.auxiliary),
            "dropout": dropout_problem(self.dropout),
        })  # fmt: skip


class STAR(nn.Module):
    """``star_s(norm_s(x)) + auxiliary([v_s, x])``, logits of two networks added up: x the dense columns beside all
    embeddings, s the row's domain, v_s an embedding of it.

    Representations: "shared", what the last layer of the star topology reads: (B, widths[-1]).
    """

    def __init__(self, config: Config, width: int, num_domains: int, num_labels: int) -> None:
        """An arch for N = `width`, S = `num_domains` and T = `num_labels`."""
        super().__init__()
        self.domain, self.num_domains = config.domain, num_domains
        self.normalize = PartitionedNorm(num_domains, width) if config.normalize else None
        sizes = [width, *config.widths]
        self.layers: Any = nn.ModuleList(StarLinear(num_domains, n, h) for n, h in pairwise(sizes))
        self.head = StarLinear(num_domains, sizes[-1], num_labels)
        self.dropout = nn.Dropout(config.dropout)
        self.indicator = nn.Embedding(num_domains, config.dim)
        self.auxiliary = MLP(config.dim + width, config.auxiliary, dropout=config.dropout)
        self.auxiliary_head = nn.Linear(self.auxiliary.out_width, num_labels)
        self.representation_dims = {"shared": sizes[-1]}

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: {"main": (B, F, D)}. groups: the domain, (B,). Returns logits (B, T) and "shared".
        Collective in training."""
        domains = Domains(groups[self.domain], self.num_domains)
        x = torch.cat([dense, tables["main"].flatten(1)], dim=1)
        h = x if self.normalize is None else self.normalize(x, domains)
        for layer in self.layers:
            h = self.dropout(torch.relu(layer(h, domains)))
        beside = self.auxiliary(torch.cat([self.indicator(domains.index), x], dim=1))
        return ArchOutput(self.head(h, domains) + self.auxiliary_head(beside), {"shared": h})


class StarLinear(nn.Module):
    """``(W * W_s) x + b + b_s``, * element-wise, s the row's domain.

    W and b start as those of `nn.Linear`, every W_s at 1 and b_s at 0, so that all domains start from the shared layer;
    that is our choice.
    """

    def __init__(self, num_domains: int, in_width: int, out_width: int) -> None:
        """S = `num_domains` layers from `in_width` to `out_width`."""
        super().__init__()
        self.shared = nn.Linear(in_width, out_width)
        self.weight = nn.Parameter(torch.ones(num_domains, out_width, in_width))
        self.bias = nn.Parameter(torch.zeros(num_domains, out_width))

    def forward(self, x: Tensor, domains: Domains) -> Tensor:
        """x: (B, in_width). Returns (B, out_width)."""
        return domains.linear(x, self.weight * self.shared.weight, self.bias + self.shared.bias)


class PartitionedNorm(nn.Module):
    """``(g * g_s) * (x - mean_s) / sqrt(var_s + eps) + (h + h_s)``, s the row's domain.

    In training mean_s and var_s are those of the domain's rows in the batches of all ranks, so that N ranks train as
    one, and running averages of them are kept for evaluation; padding rows are in none. A domain's first ten steps
    count alike, so that the averages hold nothing of what they start from.

    A column that is the same in all rows of a domain, such as an embedding of its id, is 0 in training, and it has to
    be 0 in evaluation too: the running mean lags behind an embedding that moves, and a variance of 0 would blow the
    difference up to 1 / sqrt(eps) = 316 times its size. Only such columns are treated so: one that
    differs in a few rows of a domain is divided by its small deviation, in evaluation as in training.
    """

    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self, num_domains: int, width: int) -> None:
        """S = `num_domains`, N = `width`."""
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.domain_scale = nn.Parameter(torch.ones(num_domains, width))
        self.domain_shift = nn.Parameter(torch.zeros(num_domains, width))
        self.register_buffer("mean", torch.zeros(num_domains, width))
        self.register_buffer("variance", torch.ones(num_domains, width))
        self.register_buffer("steps", torch.zeros(num_domains, 1))  # that are in the running averages

    def forward(self, x: Tensor, domains: Domains) -> Tensor:
        """x: (B, N). Returns (B, N) float32."""
        with torch.autocast(x.device.type, enabled=False):
            x, member = x.float(), domains.one_hot()
            mean, variance = self._of_batch(x, member) if self.training else (self.mean, self.variance)
            scale = self.scale * self.domain_scale * torch.rsqrt(variance + _EPS)
            if not self.training:
                scale = scale.where(variance > _CONSTANT * mean.square() + 1e-6 * _EPS, 0)
            shift = self.shift + self.domain_shift - mean * scale
            # products with the one-hot rows, and not indices: their gradients are products too, in a fixed order
            return x * (member @ scale) + member @ shift

    def _of_batch(self, x: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
        """(S, N) mean and (biased) variance of each domain; those of a domain without rows are not used."""
        number = total(member.sum(dim=0)).unsqueeze(1)
        rows = number.clamp(min=1)
        mean = sum_over_ranks(member.T @ x) / rows
        centred = x - member @ mean
        variance = sum_over_ranks(member.T @ centred.square()) / rows
        with torch.no_grad():
            has_variance = number > 1  # one row has none
            self.steps += has_variance
            step = (1 / self.steps.clamp(min=1)).clamp(min=_MOMENTUM).where(has_variance, 0)
            self.mean.lerp_(mean, step.expand_as(mean))
            self.variance.lerp_(variance, step.expand_as(variance))
        return mean, variance
