"""A log with two small planted cohorts of users, in whom the same features have opposite effects.

Users have a `value`, and `segment` is its twentieth part of all rows, 0 to 19. The users of least value are the *tail*,
those of most value the *head*, each with a small share of the rows; the rest is the majority. The log-odds of a click
of user u on item i of category k::

    base + bias_u + bias_i + <p_u, q_i> / 2 + s_u * (shift + strength * taste_k)

with s_u = 1 in the head, -1 in the tail and 0 in the majority: an average over all users hides the taste, and the
shift makes predictions for the two cohorts differ most. `region` is an axis with nothing behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dist_rec.data.synthetic_domains import Truth
from dist_rec.settings import Complaint

SEGMENTS, REGIONS = 20, 8
SKEW = 0.5  # user k has a share of the rows that falls as k ** -SKEW: none has as many as a cohort
TAIL, MAJORITY, HEAD = 0, 1, 2
_WIDTH = 4
_BIAS = 0.4
_BASE = -1.5
_SIGN = np.array([-1.0, 0.0, 1.0])


@dataclass
class PlantedCohorts:
    """What `data.synthetic.cohorts` takes: a log with two planted cohorts in place of the one with histories."""

    share: float = 0.05  # of the rows, of the head and of the tail each
    shift: float = 0.8  # of the log-odds, up in the head and down in the tail
    strength: float = 1.0  # standard deviation of the taste in the two cohorts

    def check(self) -> Iterator[Complaint]:
        """Complaints about the settings themselves."""
        if not 0 < self.share < 0.5:
            yield Complaint("share", f"is {self.share}; two cohorts and a majority need a share > 0 and < 0.5")


class CohortsWorld:
    """The hidden truth: each user's value and cohort, biases, vectors and the tastes of the cohorts."""

    def __init__(self, config: PlantedCohorts, user_shares: np.ndarray, items: int, categories: int, seed: int) -> None:
        """user_shares: (users,) of each user in the rows; the others are numbers of ids."""
        rng, users = np.random.default_rng([seed, 3]), len(user_shares)
        self.config = config
        self.cohort, self.segment, self.value = _values(rng, user_shares, config.share)
        self.region, self.category = rng.integers(0, REGIONS, users), rng.integers(0, categories, items)
        self.user_bias, self.item_bias = rng.normal(0, _BIAS, users), rng.normal(0, _BIAS, items)
        self.users, self.items = rng.normal(0, 1, (users, _WIDTH)), rng.normal(0, 1, (items, _WIDTH))
        taste = rng.normal(0, 1, categories)
        self.taste = taste - taste[self.category].mean()

    def rows(
        self, rng: np.random.Generator, user: np.ndarray, item: np.ndarray, first_row: int
    ) -> tuple[pa.Table, Truth]:
        """A table with the given (n,) users and items, and what is behind it; its "domain" is the cohort."""
        interest = (self.users[user] * self.items[item]).sum(axis=1) / np.sqrt(_WIDTH)
        common = _BASE + self.user_bias[user] + self.item_bias[item] + interest
        category, cohort = self.category[item], self.cohort[user]
        logit = common + _SIGN[cohort] * (self.config.shift + self.config.strength * self.taste[category])
        label = rng.random(len(user)) < 1 / (1 + np.exp(-logit))
        table = pa.table({
            "label": label.astype(np.float32),
            "row_id": np.arange(first_row, first_row + len(user)),
            "user_id": user,
            "item_id": item,
            "category": category,
            "segment": self.segment[user],
            "region": self.region[user],
            "value": self.value[user].astype(np.float32),
            "planted": cohort,
        })  # fmt: skip
        return table, Truth(cohort, label, logit, common)


def _values(rng: np.random.Generator, shares: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(users,) cohort, segment and value, by the share of the rows that users of less value have; drawn."""
    users = len(shares)
    order = rng.permutation(users)
    below = np.cumsum(shares[order]) - shares[order] / 2
    cohort, segment, value = np.empty(users, np.int64), np.empty(users, np.int64), np.empty(users)
    cohort[order] = np.where(below < share, TAIL, np.where(below > 1 - share, HEAD, MAJORITY))
    segment[order] = np.minimum(below * SEGMENTS, SEGMENTS - 1).astype(np.int64)
    value[order] = np.sort(rng.lognormal(3, 1, users))
    return cohort, segment, value
