"""PEPNet: gates that know the domain scale the embeddings, gates that know user and item scale the layers of the MLP.

Source: Chang et al. 2023, "PEPNet: Parameter and Embedding Personalized Network for Infusing with Personalized Prior
Information", arXiv 2302.01115. Letters: B rows, Nd dense columns, F sparse features, P prior features, Q domain
features, D and Dp widths of embeddings, T labels, N = Nd + F * D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, TableSet
from dist_rec.data.schema import Schema
from dist_rec.nn.experts import GateUnit
from dist_rec.nn.mlp import dropout_problem, size_problem, widths_problem
from dist_rec.settings import Complaint, complain


@dataclass
class Config:
    """What `model:` takes with `name: pepnet`."""

    domain_features: list[
        str
    ]  # sparse features whose own tables EPNet reads: the domain's id, statistics of the domain
    prior: list[str]  # sparse features whose own tables PPNet reads: in the paper the ids of user, item and author
    dim: int = 16  # D: width of every embedding that is scaled
    prior_dim: int = 16  # Dp: width of the embeddings that the gates read
    widths: list[int] = field(default_factory=lambda: [128, 64])  # of each label's MLP, before the logit
    gate_hidden: int = 64  # width of the hidden layer of every gate unit
    dropout: float = 0.0  # probability of dropping a unit of the MLPs in training

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """ "main" of all sparse features, "domain" and "prior" for the gates."""
        return [
            TableSet("main", tuple(schema.sparse), self.dim),
            TableSet("domain", tuple(self.domain_features), self.prior_dim),
            TableSet("prior", tuple(self.prior), self.prior_dim),
        ]

    def build(self, schema: Schema) -> PEPNet:
        """The dense arch for `schema`, freshly initialised."""
        return PEPNet(self, len(schema.dense) + len(schema.sparse) * self.dim, len(schema.labels))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        for key in ("domain_features", "prior"):
            names = getattr(self, key)
            problem = schema.features_problem(names) if names else "is empty; name at least one sparse feature"
            yield from complain({key: problem})
        yield from complain({
            "dim": size_problem(self.dim),
            "prior_dim": size_problem(self.prior_dim),
            "widths": widths_problem(self.widths, needed=True),
            "gate_hidden": size_problem(self.gate_hidden),
            "dropout": dropout_problem(self.dropout),
        })  # fmt: skip


class PEPNet(nn.Module):
    """EPNet: ``x = gate([domain embeddings, x0]) * x0``, x0 the dense columns beside all embeddings. PPNet, for each
    label: ``h_{l+1} = relu(W_l (g_l * h_l) + b_l)`` from h_0 = x, all g cut out of ``gate([prior embeddings, x])``; the
    logit's layer is scaled too. No gradient flows through what a gate reads of x0 and x.

    The domain is known by its features alone: there are no towers by domain, and unknown ids are the schema's business.

    Representations: "shared", EPNet's x: (B, N).
    """

    def __init__(self, config: Config, width: int, num_labels: int) -> None:
        """An arch for N = `width` and T = `num_labels`."""
        super().__init__()
        hidden, dims = config.gate_hidden, config.prior_dim
        self.domain_gate = GateUnit(len(config.domain_features) * dims + width, hidden, width)
        self.widths = [width, *config.widths]
        self.num_labels = num_labels
        self.prior_gate = GateUnit(len(config.prior) * dims + width, hidden, num_labels * sum(self.widths))
        self.layers = nn.ModuleList(
            nn.Linear(fan_in, fan_out) for _ in range(num_labels) for fan_in, fan_out in pairwise([*self.widths, 1])
        )
        self.dropout = nn.Dropout(config.dropout)
        self.representation_dims = {"shared": width}

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: "main" (B, F, D), "domain" (B, Q, Dp), "prior" (B, P, Dp). groups: unused. Returns
        logits (B, T) and "shared"."""
        x0 = torch.cat([dense, tables["main"].flatten(1)], dim=1)
        x = self.domain_gate(torch.cat([tables["domain"].flatten(1), x0.detach()], dim=1)) * x0
        factors = self.prior_gate(torch.cat([tables["prior"].flatten(1), x.detach()], dim=1))
        steps = list(zip(self.layers, factors.split(self.widths * self.num_labels, dim=1), strict=True))
        depth = len(self.widths)
        logits = [self._mlp(x, steps[label * depth : (label + 1) * depth]) for label in range(self.num_labels)]
        return ArchOutput(torch.cat(logits, dim=1), {"shared": x})

    def _mlp(self, h: Tensor, steps: list[tuple[nn.Module, Tensor]]) -> Tensor:
        """h: (B, N). steps: each layer with the factors of its input. Returns (B, 1)."""
        *inner, (head, factors_of_head) = steps
        for layer, factors in inner:
            h = self.dropout(torch.relu(layer(factors * h)))
        return head(factors_of_head * h)
