"""A log of several domains with planted shared and domain-specific interests, and the best possible scores on it.

The log-odds of a click of user u on item i in domain s::

    bias_s + bias_u + bias_i
        + 1.5 * (sqrt(c / 2) * common_ui + sqrt(c / 2) * sign_s * contested_ui + sqrt(1 - c) * own_sui)

with c = `shared`. Each of the interests is <p_u, q_i> / 2 of hidden vectors of width 4 and has variance 1. *common*
counts alike in every domain. *contested* counts in every domain, with opposite signs in even and odd ones, so that
averaging over domains hides it. *own_s* counts in domain s alone: nothing about it can be learnt elsewhere. Half of the
variance of a user's vectors is that of the segment, half of an item's that of the category, so that a small domain has
something to learn from too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from dist_rec.settings import Complaint

SEGMENTS = 40
_WIDTH = 4
_SCALE = 1.5
_BIAS = 0.4
_BASE = -1.0


@dataclass
class DomainsConfig:
    """What `data.synthetic.domains` takes: a log of several domains in place of the one with cohorts and histories."""

    # rows of each domain, in any unit; default: the five tabs of KuaiRand-1K, the first 13 times as large as the last
    sizes: list[float] = field(default_factory=lambda: [2407352, 7760237, 895385, 402366, 183403])
    shared: float = 0.5  # c, the share of the interests' variance that all domains draw on

    def check(self) -> Iterator[Complaint]:
        """Complaints about the settings themselves."""
        if not self.sizes or not all(size > 0 for size in self.sizes):
            yield Complaint("sizes", f"is {self.sizes}; give every domain a number of rows > 0")
        if not 0 <= self.shared <= 1:
            yield Complaint("shared", f"is {self.shared}; a share lies between 0 and 1")


class Truth(NamedTuple):
    """What is hidden behind n rows: (n,) each. `shared`: the log-odds without the domain's own interest."""

    domain: np.ndarray
    label: np.ndarray
    logit: np.ndarray
    shared: np.ndarray


class DomainsWorld:
    """The hidden truth: biases, and the vectors of every interest by id."""

    def __init__(self, config: DomainsConfig, users: int, items: int, categories: int, seed: int) -> None:
        rng = np.random.default_rng([seed, 2])
        self.config, domains = config, len(config.sizes)
        self.segment, self.category = rng.integers(0, SEGMENTS, users), rng.integers(0, categories, items)
        self.user_bias, self.item_bias = rng.normal(0, _BIAS, users), rng.normal(0, _BIAS, items)
        self.domain_bias = _BASE + rng.normal(0, _BIAS, domains)
        self.sign = np.where(np.arange(domains) % 2 == 0, 1.0, -1.0)
        # one interest after the other: common, contested, own_0, own_1, ...
        self._users = [_vectors(rng, self.segment, SEGMENTS) for _ in range(2 + domains)]
        self._items = [_vectors(rng, self.category, categories) for _ in range(2 + domains)]

    def rows(
        self, rng: np.random.Generator, user: np.ndarray, item: np.ndarray, first_row: int
    ) -> tuple[pa.Table, Truth]:
        """A table with the given (n,) users and items, and what is behind it."""
        sizes = np.array(self.config.sizes)
        domain = rng.choice(len(sizes), len(user), p=sizes / sizes.sum())
        shared = self.domain_bias[domain] + self.user_bias[user] + self.item_bias[item]
        shared = shared + _SCALE * np.sqrt(self.config.shared / 2) * self.interest("common", user, item)
        contested = self.sign[domain] * self.interest("contested", user, item)
        shared = shared + _SCALE * np.sqrt(self.config.shared / 2) * contested
        own = np.zeros(len(user))
        for s in range(len(sizes)):
            here = domain == s
            own[here] = self.interest(s, user[here], item[here])
        logit = shared + _SCALE * np.sqrt(1 - self.config.shared) * own
        label = rng.random(len(user)) < 1 / (1 + np.exp(-logit))
        table = pa.table({
            "label": label.astype(np.float32),
            "row_id": np.arange(first_row, first_row + len(user)),
            "user_id": user,
            "item_id": item,
            "segment": self.segment[user],
            "category": self.category[item],
            "domain": domain,
        })  # fmt: skip
        return table, Truth(domain, label, logit, shared)

    def interest(self, which: str | int, user: np.ndarray, item: np.ndarray) -> np.ndarray:
        """(n,) interest of users in items: "common", "contested", or a domain's own by its number."""
        at = {"common": 0, "contested": 1}[which] if isinstance(which, str) else 2 + which
        return (self._users[at][user] * self._items[at][item]).sum(axis=1) / np.sqrt(_WIDTH)


def _vectors(rng: np.random.Generator, group: np.ndarray, groups: int) -> np.ndarray:
    """(n, 4) vectors of variance 1, of which half is the group's."""
    of_group, own = rng.normal(0, 1, (groups, _WIDTH)), rng.normal(0, 1, (len(group), _WIDTH))
    return np.sqrt(0.5) * (of_group[group] + own)


def write_truth(splits: dict[str, list[Truth]], path: Path) -> None:
    """Writes what the planted log-odds themselves score on each split, in all and by domain, as JSON.

    {split: {"all" or domain: {...}}} with "rows", "positives" (their share), and of the true log-odds on the labels of
    these very files "auc" and "ne", which no model beats but by luck, and "auc_shared", the AUC of a model that knows
    all but the domain's own interest.
    """
    report = {}
    for split, parts in splits.items():
        truth = Truth(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
        report[split] = {"all": _score(truth)} | {
            str(s): _score(Truth(*(a[truth.domain == s] for a in truth))) for s in np.unique(truth.domain)
        }
    path.write_text(json.dumps(report, indent=1) + "\n")


def _score(truth: Truth) -> dict[str, float | int | None]:
    y, z = truth.label.astype(np.float64), truth.logit
    rate = float(y.mean())
    if not 0 < rate < 1:
        return {"rows": len(y), "positives": rate, "auc": None, "ne": None, "auc_shared": None}
    loss = (y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)).mean()
    entropy = -rate * np.log(rate) - (1 - rate) * np.log1p(-rate)
    scores = {"auc": _auc(z, y), "ne": float(loss / entropy), "auc_shared": _auc(truth.shared, y)}
    return {"rows": len(y), "positives": rate, **scores}


def _auc(score: np.ndarray, label: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order, ties as half (`metrics` is above this room)."""
    _, place = np.unique(score, return_inverse=True)
    positive, negative = np.bincount(place, label), np.bincount(place, 1 - label)
    return float((positive * (np.cumsum(negative) - negative / 2)).sum() / (positive.sum() * negative.sum()))
