"""DHEN: a stack of layers, each an ensemble of different interaction modules with a residual around it.

Source: Zhang et al. 2022, arXiv 2203.11014; its attention-FM is that of C2AL, arXiv 2510.02215, figure 1.
Letters: B rows, Nd dense columns, F sparse features, M features of a layer (F, and one of the dense columns), D width,
T labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, TableSet
from dist_rec.data.schema import Schema
from dist_rec.nn.attention_fm import AttentionFM, Gram
from dist_rec.nn.cross import cross_network
from dist_rec.nn.interaction import DotInteraction
from dist_rec.nn.mlp import MLP, dropout_problem, widths_problem
from dist_rec.settings import Complaint

Interaction = Literal["attention_fm", "dot", "cross", "linear"]


@dataclass
class Config:
    """What `model:` takes with `name: dhen`."""

    dim: int = 16  # D: width of every embedding, and of every feature in every layer
    # the interaction modules of each layer; the number of lists is the depth
    layers: list[list[Interaction]] = field(
        default_factory=lambda: [["attention_fm", "cross"], ["attention_fm", "linear"]]
    )
    ensemble: Literal["sum", "concat"] = "sum"  # of a layer's modules; concat: of their features, then linear back to M
    attention_columns: int = 8  # K: columns of the attention Y, to which X X^T is compressed
    attention_hidden: list[int] = field(default_factory=lambda: [64])  # widths of the attention MLP before Y
    # which X X^T: of features (an FM), or literally equation 1 of C2AL, of embedding dimensions
    gram: Gram = "features"
    rank: int | None = None  # of the cross matrices; nothing: full (M * D) x (M * D)
    bottom: list[int] = field(default_factory=lambda: [64])  # widths before the last layer, which has D; dense only
    top: list[int] = field(default_factory=lambda: [128, 64])  # widths before the logits
    dropout: float = 0.0  # probability of dropping a unit of the top MLP in training

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """One set, "main", of all sparse features."""
        return [TableSet("main", tuple(schema.sparse), self.dim)]

    def build(self, schema: Schema) -> DHEN:
        """The dense arch for `schema`, freshly initialised."""
        return DHEN(self, num_dense=len(schema.dense), num_sparse=len(schema.sparse), num_labels=len(schema.labels))

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `model`."""
        if self.dim < 2:
            text = "a layer norms every feature over its columns, and of a single one nothing is left"
            yield Complaint("dim", f"is {self.dim}; {text}: use at least 2")
        if not self.layers:
            yield Complaint("layers", "is empty; give at least one layer, for example [[attention_fm, linear]]")
        for i, modules in enumerate(self.layers):
            if not modules or len({*modules}) < len(modules):
                yield Complaint(f"layers[{i}]", f"is {modules}; name one or more different interaction modules")
        if self.attention_columns < 1:
            yield Complaint("attention_columns", f"is {self.attention_columns}; use at least 1")
        for key, problem in (
            ("attention_hidden", widths_problem(self.attention_hidden)),
            ("bottom", widths_problem(self.bottom)),
            ("top", widths_problem(self.top, needed=True)),
            ("dropout", dropout_problem(self.dropout)),
        ):
            if problem:
                yield Complaint(key, problem)
        num_features = len(schema.sparse) + bool(schema.dense)
        width = num_features * self.dim
        if self.rank is not None and not 1 <= self.rank < width:
            text = f"is {self.rank}; use 1 to M * D - 1 with M * D = {width} ((sparse features + 1 if dense) * dim)"
            yield Complaint("rank", f"{text}, or leave it out for full matrices")
        if num_features == 1 and any("dot" in modules for modules in self.layers):
            text = "names 'dot', which multiplies pairs of features, but the schema makes only one feature"
            yield Complaint("layers", f"{text}; add a feature or leave 'dot' out")


class DHEN(nn.Module):
    """Bottom MLP on the dense columns, layers of interactions over M features of width D, top MLP.

    Representations: "shared", the (B, top[-1]) input of the logits.
    """

    def __init__(self, config: Config, *, num_dense: int, num_sparse: int, num_labels: int) -> None:
        """An arch for Nd = `num_dense`, F = `num_sparse` and T = `num_labels`."""
        super().__init__()
        num_features = num_sparse + bool(num_dense)
        self.bottom = MLP(num_dense, [*config.bottom, config.dim]) if num_dense else None
        self.layers = nn.Sequential(*(Layer(config, names, num_features) for names in config.layers))
        self.top = MLP(num_features * config.dim, config.top, dropout=config.dropout)
        self.head = nn.Linear(self.top.out_width, num_labels)
        self.representation_dims = {"shared": self.top.out_width}

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: {"main": (B, F, D)}. groups: unused. Returns logits (B, T) and "shared"."""
        x = tables["main"]
        if self.bottom is not None:
            x = torch.cat([self.bottom(dense).unsqueeze(1), x], dim=1)
        shared = self.top(self.layers(x).flatten(1))
        return ArchOutput(self.head(shared), {"shared": shared})


class Layer(nn.Module):
    """``norm(ensemble_i(interaction_i(X)) + X)``: every module reads the layer's input, and all results have its shape.

    The paper lets a layer change the number of features, with a linear shortcut; here M stays, and the shortcut is X.

    Source: arXiv 2203.11014, section 3 (layer, ensemble by sum or by concatenation, residual and norm).
    """

    def __init__(self, config: Config, names: list[Interaction], num_features: int) -> None:
        """A layer of the modules `names` over M = `num_features`."""
        super().__init__()
        self.interactions = nn.ModuleDict({name: _INTERACTIONS[name](config, num_features) for name in names})
        self.mix = None
        if config.ensemble == "concat":  # no bias: a constant over a feature's D columns, which the norm takes away
            self.mix = nn.Linear(len(names) * num_features, num_features, bias=False)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, M, D). Returns (B, M, D)."""
        found = [interaction(x) for interaction in self.interactions.values()]
        if self.mix is not None:
            ensemble = self.mix(torch.cat(found, dim=1).mT).mT
        else:
            ensemble = torch.stack(found).sum(dim=0)
        return self.norm(ensemble + x)


class _Dot(nn.Module):
    """All pairs' dot products, mapped back to M features. Its map is called `fm`: the FM layer of C2AL's figures."""

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.dots = DotInteraction(num_features)
        self.fm = nn.Linear(self.dots.out_width, num_features * dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fm(self.dots(x)).view(x.shape)


class _Cross(nn.Module):
    """One DCN-V2 cross layer over vec X."""

    def __init__(self, width: int, rank: int | None) -> None:
        super().__init__()
        self.cross = cross_network(width, 1, rank)

    def forward(self, x: Tensor) -> Tensor:
        return self.cross(x.flatten(1)).view(x.shape)


class _Linear(nn.Module):
    """Every feature becomes a linear combination of all features. No bias, as in `Layer.mix`."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mT).mT


def _attention_fm(config: Config, num_features: int) -> nn.Module:
    return AttentionFM(
        num_features,
        config.dim,
        columns=config.attention_columns,
        hidden=config.attention_hidden,
        gram=config.gram,
    )


_INTERACTIONS: dict[Interaction, Callable[[Config, int], nn.Module]] = {
    "attention_fm": _attention_fm,
    "dot": lambda config, num_features: _Dot(num_features, config.dim),
    "cross": lambda config, num_features: _Cross(num_features * config.dim, config.rank),
    "linear": lambda config, num_features: _Linear(num_features),
}
"""name -> what makes the module for M features; each maps (B, M, D) to (B, M, D)."""
