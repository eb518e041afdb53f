"""Spread-out regularisation: the vectors of different items should not be near to each other.

Sources: Zhang et al. 2017, "Learning Spread-out Local Feature Descriptors"; as the baseline of Yao et al. 2021, arXiv
2007.12865. Items are drawn uniformly from the catalogue. Letters: N items of all ranks, B of this one, V width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from dist_rec.contract import ArchOutput, Encode, Fill
from dist_rec.data.batch import Batch
from dist_rec.data.catalogue import Catalogue
from dist_rec.data.draws import Draws
from dist_rec.data.schema import Schema
from dist_rec.data.views import Views, row_numbers, view_key, with_views
from dist_rec.nn.gather import gather, rank
from dist_rec.nn.softmax import softmax_loss
from dist_rec.settings import Complaint

VIEW = "spread_out"
ITEM = "spread_out#item"
"""Group with the item that was drawn for each row, (B,) int64."""


@dataclass
class Config:
    """What `auxiliary.spread_out:` takes."""

    weight: float = 0.1  # of the term; 0 leaves the run as if this were not there
    # squared: (1/N) sum over pairs of <z_i, z_j>^2, an item that was drawn twice with itself too. softmax: the
    # contrastive loss of identical views, (1/N) sum_i -log(e^(1/t) / sum_j e^(<z_i, z_j>/t)), where it is no negative
    form: Literal["squared", "softmax"] = "squared"
    temperature: float = 0.07  # t of the softmax

    @property
    def is_off(self) -> bool:
        """Whether a run is to be as if this were not there."""
        return self.weight == 0

    def views(self, schema: Schema) -> Views:
        """One view of every feature of the item, with nothing masked."""
        return {VIEW: tuple(schema.item_features())}

    def fill(self, catalogue: Catalogue, seed: int) -> Fill:
        """What draws items and puts them into a batch."""
        return partial(_with_items, catalogue, seed)

    def build(self, schema: Schema, representation_dims: Mapping[str, int]) -> SpreadOut:
        """The loss; it uses no representation."""
        return SpreadOut(self)

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `auxiliary.spread_out`."""
        if schema.items is None:
            yield Complaint("", "draws items from an item table; declare schema.items and set data.items")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            yield Complaint("weight", f"is {self.weight}; the weight of a loss must be finite and >= 0")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            yield Complaint("temperature", f"is {self.temperature}; inner products are divided by it: use a number > 0")


def _with_items(catalogue: Catalogue, seed: int, batch: Batch, step: int, rank: int) -> Batch:
    items = Draws(seed, VIEW, step).below(len(catalogue), "item", row_numbers(batch, rank))
    bags = {view_key(name, VIEW): found for name, found in catalogue.bags(items).items()}
    return with_views(batch, bags, {VIEW: catalogue.dense(items)}, {ITEM: catalogue.ids(items)})


class SpreadOut(nn.Module):
    """weight * the mean over the N items of what each has to do with all others, as `Config.form` says."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self._config = config

    def forward(self, output: ArchOutput, batch: Batch, encode: Encode) -> dict[str, Tensor]:
        """Returns {"spread_out": scalar float32}."""
        vectors = nn.functional.normalize(encode(VIEW).float(), dim=1)
        everyone = gather(vectors)
        if self._config.form == "squared":
            # the sum over all pairs is that over the (V, V) second moments: no N x N matrix is needed
            pairs = ((vectors @ (everyone.T @ everyone)) * vectors).sum(dim=1)
            losses = pairs - (vectors * vectors).sum(dim=1).square()
        else:
            ids = batch.groups[ITEM]
            losses = softmax_loss(
                vectors,
                everyone,
                torch.arange(len(ids), device=ids.device) + rank() * len(ids),
                temperature=self._config.temperature,
                row_ids=ids,
                column_ids=gather(ids),
            )
        return {"spread_out": self._config.weight * losses.mean()}
