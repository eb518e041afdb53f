"""Interactions of users with items of a catalogue, and the item table, with planted structure: for retrieval.

Every item has a category, a brand and words, which are drawn by its category; its hidden vector is the sum of theirs
and a small one of its own. A user's taste is the vector of two favourite items. An interaction is the best for the
user, by taste and chance, of some candidates, popular ones more often; so is every item of the history. The last
`unseen` share of the items is in the catalogue, but in no interaction of train: only what their features have in
common with other items can find them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_rec.settings import Complaint

WORDS = 500
BRANDS_PER_CATEGORY = 4
_WIDTH = 8
_OWN = 0.5  # standard deviation of an item's own vector, against 1 of category and brand
_CANDIDATES = 16
_CHANCE = 2.0  # scale of the chance in a choice
_MAX_HISTORY = 10
_MAX_WORDS = 6
_WORD_TRIES = 64


@dataclass
class RetrievalConfig:
    """What `data.synthetic.retrieval` takes: interactions and an item table in place of the log with labels."""

    unseen: float = 0.05  # share of the items that no row of train has

    def check(self) -> Iterator[Complaint]:
        """Complaints about the settings themselves."""
        if not 0 <= self.unseen < 1:
            yield Complaint("unseen", f"is {self.unseen}; a share of the items is >= 0 and < 1")


class RetrievalWorld:
    """The hidden truth, by id."""

    def __init__(
        self, config: RetrievalConfig, users: int, items: int, categories: int, train_rows: int, seed: int
    ) -> None:
        rng = np.random.default_rng([seed, 3])
        self.category = rng.integers(0, categories, items)
        self.brand = self.category * BRANDS_PER_CATEGORY + rng.integers(0, BRANDS_PER_CATEGORY, items)
        of_category = rng.normal(size=(categories, _WIDTH))
        of_brand = rng.normal(size=(categories * BRANDS_PER_CATEGORY, _WIDTH))
        own = _OWN * rng.normal(size=(items, _WIDTH))
        self.vectors = of_category[self.category] + of_brand[self.brand] + own
        self.tastes = self.vectors[rng.integers(0, items, (users, 2))].mean(axis=1)
        self.seen_items = max(1, round(items * (1 - config.unseen)))
        self._train_rows = train_rows
        # a word is that of some category: an item draws most of its words from those of its own
        self._word_category = rng.integers(0, categories, WORDS)
        self._rng = rng

    def items(self) -> pa.Table:
        """The item table."""
        rng, count = self._rng, len(self.category)
        lengths = rng.integers(1, _MAX_WORDS + 1, count)
        words = rng.integers(0, WORDS, (int(lengths.sum()), _WORD_TRIES))
        owner = np.repeat(self.category, lengths)
        # of some words at random the first of the item's category, if there is one
        words = words[np.arange(len(words)), (self._word_category[words] == owner[:, None]).argmax(axis=1)]
        price = np.exp(0.3 * self.vectors[:, 0] + 0.1 * rng.normal(size=count))
        return pa.table({
            "item_id": np.arange(count),
            "category": self.category,
            "brand": self.brand,
            "words": pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), words),
            "price": price.astype(np.float32),
        })  # fmt: skip

    def rows(
        self, rng: np.random.Generator, user: np.ndarray, item: np.ndarray, first_row: int
    ) -> tuple[pa.Table, None]:
        """Interactions of (n,) users, who are shown the (n,) items among others; what is behind them is not told.

        The rows of train come first, and have no unseen items; histories never have.
        """
        lengths = rng.integers(1, _MAX_HISTORY + 1, len(user))
        owner = np.repeat(user, lengths)
        history = self._chosen(rng, owner, rng.integers(0, self.seen_items, len(owner)), self.seen_items)
        items = self.seen_items if first_row < self._train_rows else len(self.category)
        table = pa.table({
            "row_id": np.arange(first_row, first_row + len(user)),
            "user_id": user,
            "history": pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), history),
            "item_id": self._chosen(rng, user, item % items, items),
        })  # fmt: skip
        return table, None

    def _chosen(self, rng: np.random.Generator, user: np.ndarray, shown: np.ndarray, items: int) -> np.ndarray:
        """(n,) the best for the user of the items shown and of others below `items`, half drawn by popularity."""
        popular = (items * rng.random((len(user), _CANDIDATES // 2)) ** 3).astype(np.int64)
        candidates = np.concatenate([shown[:, None], popular, rng.integers(0, items, popular.shape)], axis=1)
        score = np.einsum("nw,ncw->nc", self.tastes[user], self.vectors[candidates])
        best = (score + _CHANCE * rng.gumbel(size=score.shape)).argmax(axis=1)
        return candidates[np.arange(len(user)), best]


def write_items(world: RetrievalWorld, folder: Path) -> None:
    """Writes the item table to `folder`/items.parquet."""
    pq.write_table(world.items(), folder / "items.parquet", row_group_size=1000)
