"""Contrastive learning of items: two masked views of each item should have vectors near to each other.

Source: Yao et al. 2021, "Self-supervised Learning for Large-scale Item Recommendations", arXiv 2007.12865, equations 12
to 14; masking of embedding dimensions: "Contrastive Learning for Conversion Rate Prediction" (CL4CVR, 2023). Items are
drawn uniformly from the catalogue. Both views are encoded by the arch's own item tower, so nothing is added to what is
served. Letters: B rows of this rank, W ranks, V width of a vector, k maskable features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from dist_rec.auxiliary.contrastive.masks import Masking, features_problem, source
from dist_rec.auxiliary.contrastive.views import ITEM, NOISE, VIEWS, ItemViews, keep_dimensions
from dist_rec.contract import ArchOutput, Encode, Fill
from dist_rec.data.batch import Batch
from dist_rec.data.catalogue import Catalogue
from dist_rec.data.schema import Schema
from dist_rec.data.views import Views
from dist_rec.nn.gather import gather, rank
from dist_rec.nn.mlp import dropout_problem
from dist_rec.nn.softmax import softmax_loss
from dist_rec.settings import Complaint


@dataclass
class Config(Masking):
    """What `auxiliary.contrastive:` takes, with the keys of `Masking`."""

    alpha: float = 0.1  # weight of the term; 0 leaves the run as if this were not there
    temperature: float = 0.07  # of this loss alone; the paper has one for both, so set the objective's here
    value_dropout: float = 0.3  # probability of dropping each id of a list that a view shows
    dimension_dropout: float = 0.0  # probability of setting each looked-up number of a view to 0 (CL4CVR)
    # an item that was drawn more than once is no negative of itself
    mask_same_item: bool = True
    max_logits: int = 2**24  # logits in memory at a time, 4 bytes each; speed and memory only
    # mutual information of the item table's columns, for cfm: `dist-rec correlation` writes a file to put under `base`
    correlation: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def is_off(self) -> bool:
        """Whether a run is to be as if this were not there."""
        return self.alpha == 0

    def views(self, schema: Schema) -> Views:
        """Two views of every feature of the item."""
        return dict.fromkeys(VIEWS, tuple(schema.item_features()))

    def fill(self, catalogue: Catalogue, seed: int) -> Fill:
        """What draws items and puts their views into a batch."""
        return ItemViews(self, self.correlation, self.value_dropout, catalogue, seed)

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> Contrastive:
        """The loss; it uses no representation."""
        return Contrastive(self)

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `auxiliary.contrastive`."""
        if schema.items is None:
            yield Complaint("", "draws items from an item table; declare schema.items and set data.items")
            return
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            yield Complaint("alpha", f"is {self.alpha}; the weight of a loss must be finite and >= 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            yield Complaint("temperature", f"is {self.temperature}; logits are divided by it, so it must be > 0")
        for key in ("value_dropout", "dimension_dropout"):
            if problem := dropout_problem(getattr(self, key)):
                yield Complaint(key, problem)
        if self.max_logits < 1:
            yield Complaint("max_logits", f"is {self.max_logits}; use at least 1")
        yield from self.check_masking(schema)
        if self.masking == "cfm" and not features_problem(self, schema):
            yield from self._check_correlation(schema)

    def _check_correlation(self, schema: Schema) -> Iterator[Complaint]:
        columns = [source(feature, schema) for feature in self.maskable(schema)]
        for one in columns:
            missing = [other for other in columns if other != one and other not in self.correlation.get(one, {})]
            if missing:
                text = f"says nothing about columns '{one}' and '{missing[0]}' of the item table, as cfm needs; run"
                yield Complaint(
                    "correlation",
                    f"{text}: dist-rec correlation ITEMS correlation.yaml, and list that file under base",
                )
                return


class Contrastive(nn.Module):
    """alpha * mean over the items of -log softmax(cos(z, z') / temperature), over the second views of all ranks' items.

    Equation 12: one direction, negatives across views only. Each rank takes its own items against everybody's second
    views, gathered with their gradient, so that the mean over ranks is one rank's loss.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config

    def forward(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns {"contrastive": scalar float32}."""
        config, ids = self._config, batch.groups[ITEM]
        changes = [None, None] if not config.dimension_dropout else [
            partial(keep_dimensions, batch.groups[NOISE], number, config.dimension_dropout)
            for number in range(len(VIEWS))
        ]  # fmt: skip
        first, second = (
            nn.functional.normalize(encode(view, change).float(), dim=1)
            for view, change in zip(VIEWS, changes, strict=True)
        )
        losses = softmax_loss(
            first,
            gather(second),
            torch.arange(len(ids), device=ids.device) + rank() * len(ids),
            temperature=config.temperature,
            row_ids=ids if config.mask_same_item else None,
            column_ids=gather(ids) if config.mask_same_item else None,
            max_logits=config.max_logits,
        )
        return {"contrastive": config.alpha * losses.mean()}
