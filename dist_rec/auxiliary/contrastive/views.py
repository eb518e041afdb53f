"""Two views of uniformly drawn items, made on the loader's threads. Letters: B rows, F features of a view, D width."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dist_rec.auxiliary.contrastive.masks import Masking, masked_features, matrix
from dist_rec.data.bags import empty
from dist_rec.data.batch import Batch
from dist_rec.data.catalogue import Catalogue
from dist_rec.data.draws import Draws, bits, chance
from dist_rec.data.ids import Ragged
from dist_rec.data.views import row_numbers, view_key, with_views

VIEWS = ("contrastive_1", "contrastive_2")
ITEM = "contrastive#item"
"""Group with the item that was drawn for each row, (B,) int64."""

NOISE = "contrastive#noise"
"""Group with random bits of each row, (B,) int64, for what is drawn on the device."""


class ItemViews:
    """(batch, step, rank) -> the batch with both views: a pure function of these and of the seed.

    Items are drawn with replacement, each with the same probability, whatever their frequency in the interactions.
    """

    def __init__(
        self,
        masking: Masking,
        correlation: Mapping[str, Mapping[str, float]],
        value_dropout: float,
        catalogue: Catalogue,
        seed: int,
    ) -> None:
        self._masking, self._catalogue, self._seed = masking, catalogue, seed
        self._dropout = value_dropout
        self._names = masking.maskable(catalogue.schema)
        self._correlation = matrix(self._names, catalogue.schema, correlation)

    def __call__(self, batch: Batch, step: int, rank: int) -> Batch:
        """The batch with the keys of both views, their dense columns, and the groups ITEM and NOISE."""
        draws, rows = Draws(self._seed, "contrastive", step), row_numbers(batch, rank)
        items = draws.below(len(self._catalogue), "item", rows)
        whole, dense = self._catalogue.bags(items), self._catalogue.dense(items)
        masks = masked_features(self._masking, self._names, self._correlation, draws)
        bags = {
            view_key(name, view): self._shown(name, view, whole[name], masked, draws, rows)
            for view, masked in zip(VIEWS, masks, strict=True)
            for name in self._catalogue.features
        }
        groups = {
            ITEM: self._catalogue.ids(items),
            NOISE: torch.from_numpy(draws.bits("dimensions", rows).view(np.int64)),
        }
        return with_views(batch, bags, dict.fromkeys(VIEWS, dense), groups)

    def _shown(self, name: str, view: str, bags: Ragged, masked: set[str], draws: Draws, rows: np.ndarray) -> Ragged:
        """What a view shows of a feature."""
        if name in masked or name in self._masking.hidden:
            return empty(len(rows))
        if not self._catalogue.schema.sparse[name].multi or not self._dropout:
            return bags
        return dropped(bags, draws.bits(view_key(name, view), rows), self._dropout)


def dropped(bags: Ragged, noise: np.ndarray, probability: float) -> Ragged:
    """Each value of each bag is left out with that probability. noise: (B,) random bits of the bags."""
    owner = np.repeat(np.arange(len(bags.lengths)), bags.lengths)
    place = np.arange(len(owner)) - (np.cumsum(bags.lengths) - bags.lengths)[owner]
    kept = ~chance(bits(noise[owner], place), probability)
    lengths = np.bincount(owner[kept], minlength=len(bags.lengths))
    return Ragged(lengths, bags.values[kept], None if bags.weights is None else bags.weights[kept])


def keep_dimensions(noise: Tensor, number: int, probability: float, rows: Tensor) -> Tensor:
    """rows (B, F, D) with each number set to 0 with that probability. noise: (B,) int64. number: of the view."""
    width = rows[0].numel()
    index = torch.arange(number * width, (number + 1) * width, device=rows.device)
    random = _mixed(noise[:, None] + (index + 1) * _signed(0x9E3779B97F4A7C15))
    kept = _shifted(random, 11) >= round(probability * 2**53)
    return rows * kept.view(rows.shape)


def _mixed(x: Tensor) -> Tensor:
    """`data.ids.mix64` on the device; int64 arithmetic wraps around like that of uint64."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills with zeros; torch's keeps the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x
