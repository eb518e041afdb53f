"""The nouns every component shares, and what an arch, an objective and an auxiliary is.

The road of one step::

    Batch --sparse--> embedding stage --{set name: (B, F, D)}--> arch --ArchOutput--> objective + auxiliaries
          --> named loss terms --> one sum --> one backward

A component is one module file with a `Config` dataclass; `recommender` finds it by the file's name. Letters: B rows of
this rank, F features of a table set, D its served width, T labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from dist_rec.data.batch import Batch
from dist_rec.data.catalogue import Catalogue
from dist_rec.data.schema import Schema
from dist_rec.data.views import Views
from dist_rec.settings import Complaint


@dataclass(frozen=True)
class TableSet:
    """What an arch wants looked up, said before any table exists.

    Attributes:
        name: key of the result in the arch's `tables` argument ("main", "expert_0", "prior").
        features: F feature names of the schema, in the order of the result's second axis.
        dim: D, the width that is served. How a table is trained inside is the embedding config's business.
    """

    name: str
    features: tuple[str, ...]
    dim: int


class ArchOutput(NamedTuple):
    """What an arch returns.

    predictions: (B, T) logits, one column per label.
    representations: name -> (B, dim), intermediate results that auxiliaries may use; the names and widths are those
        that the arch declared as `representation_dims`.
    """

    predictions: Tensor
    representations: dict[str, Tensor]


class StepOutput(NamedTuple):
    """What a step leaves for metrics and reports; every tensor is detached.

    predictions: (B, T) logits, float32. labels: (B, T). weights: (B,), 0 for padding rows. groups: name -> (B,).
    losses: name -> scalar, the weighted terms whose sum was minimised on this rank; none in eval mode.
    compared: (B, R) float32, the representations that the metrics compare, side by side; None in training.
    representations: name -> (B, dim) float32, those that are served, of a model that is judged by retrieval; none in
        training.
    """

    predictions: Tensor
    labels: Tensor
    weights: Tensor
    groups: dict[str, Tensor]
    losses: dict[str, Tensor]
    compared: Tensor | None = None
    representations: Mapping[str, Tensor] = MappingProxyType({})


class Arch(Protocol):
    """A dense arch: an `nn.Module` from dense columns and looked-up rows to logits."""

    representation_dims: dict[str, int]

    def __call__(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        """dense: (B, Nd). tables: set name -> (B, F, D) float32. groups: name -> (B,) int64."""


class Encode(Protocol):
    """The arch's encoding of a view (`data.views`), for archs that serve views."""

    def __call__(self, view: str, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Returns (B, dim). change: what to do with the view's looked-up rows, (B, F, D), before they are encoded."""


AUXILIARIES = "dense.auxiliaries."
"""How the names of an auxiliary's parameters begin in a model and in its checkpoints; the auxiliary's name follows."""


class LossTerms(Protocol):
    """An objective or an auxiliary: an `nn.Module` that returns named, already weighted terms and never calls backward.

    A term is this rank's share such that the mean over ranks is the global value: DDP averages gradients. One that
    works on the arch's own parameters (gradient surgery) has a method `bind(arch)`, called once before training.
    """

    def __call__(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns name -> scalar."""


EvaluationKind = Literal["labels", "retrieval"]
"""labels: predictions are compared with the labels of the same rows. retrieval: a query is compared with every item
of the catalogue, by the inner product of the representations "query" and "item"."""


class ArchConfig(Protocol):
    """`Config` of a file in `models/`.

    Two class attributes may say more: `evaluation`, an EvaluationKind, by default "labels"; and `serves_views = True`
    if the arch has `encode(batch, tables, view)`, where the rows of a set's features in a view are "<set>#<view>".
    """

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """The table sets the arch looks up."""

    def build(self, schema: Schema) -> nn.Module:
        """The arch, an `Arch`, freshly initialised from torch's default generator."""

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to the component."""


Fill = Callable[[Batch, int, int], Batch]
"""(batch, training step, rank) -> the batch with its views: pure, on the loader's threads. Random numbers are a
function of (seed, step, place in the global batch), see `data.draws`, so that a resumed run draws the same."""


class ViewConfig(Protocol):
    """What the `Config` of a file in `auxiliary/` has besides, if its loss looks at views of items.

    One that masks features has a method `maskable(schema)` with their names, all of which the model must read.
    """

    def views(self, schema: Schema) -> Views:
        """The views and their features, all of them features that an item alone decides."""

    def fill(self, catalogue: Catalogue, seed: int) -> Fill:
        """What adds the keys of `views`, in their order, to each training batch."""


class LossConfig(Protocol):
    """`Config` of a file in `objectives/` or `auxiliary/`.

    One in `auxiliary/` may have a property `is_off`, True at weight 0: then no run builds it or makes its views.
    """

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> nn.Module:
        """The `LossTerms` module; a representation that the arch does not declare raises, listing those that exist."""

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to the component."""
