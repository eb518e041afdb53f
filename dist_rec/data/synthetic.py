"""A data set with planted structure, written as Parquet: enough to see in minutes whether a model learns.

What is planted, on the logit: a term per user, item and category; a product of hidden user and item vectors (only
models with interactions find it); the likeness of the item to the user's history; an effect of the hour that differs by
domain; an effect of the item that has opposite signs in opposite cohorts (an average over cohorts hides it); and dense
columns. With `domains`, `cohorts` or `retrieval` set another data set is written in its place: see `synthetic_domains`,
`synthetic_cohorts` and `synthetic_retrieval`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_rec.data.synthetic_cohorts import CohortsWorld, PlantedCohorts
from dist_rec.data.synthetic_domains import DomainsConfig, DomainsWorld, Truth, write_truth
from dist_rec.data.synthetic_retrieval import RetrievalConfig, RetrievalWorld, write_items
from dist_rec.settings import Complaint, gather

SPLITS = ("train", "validation", "test")
NUM_HOURS, NUM_COHORTS, NUM_DENSE = 24, 4, 4
_DOMAIN_SHARES = (0.7, 0.2, 0.1)
_FACTORS = 4  # width of the hidden vectors
_MAX_HISTORY = 8
_NULL_SHARE = 0.02  # of column d3


@dataclass
class SyntheticConfig:
    """Sizes of a synthetic data set. `rows` is the training split; validation and test have `eval_rows` each."""

    path: str = ".data/synthetic"
    rows: int = 400_000
    eval_rows: int = 50_000
    rows_per_file: int = 100_000
    row_group_rows: int = 20_000
    users: int = 5_000
    items: int = 2_000
    categories: int = 50
    seed: int = 20261123
    # {} or more in one of these: the log of several domains, or of planted cohorts, with truth.json beside its splits;
    # users and items without labels, with items.parquet beside
    domains: DomainsConfig | None = None
    cohorts: PlantedCohorts | None = None
    retrieval: RetrievalConfig | None = None

    def check(self) -> Iterator[Complaint]:
        """Complaints about the settings themselves."""
        for name in ("rows", "eval_rows", "rows_per_file", "row_group_rows", "users", "items", "categories"):
            if getattr(self, name) < 1:
                yield Complaint(name, f"is {getattr(self, name)}; use at least 1")
        if self.seed < 0:
            yield Complaint("seed", f"is {self.seed}; use 0 or more")
        given = [name for name in ("domains", "cohorts", "retrieval") if getattr(self, name) is not None]
        for name in given:
            yield from gather(name, getattr(self, name).check())
        if len(given) > 1:
            yield Complaint(given[1], f"is set and `{given[0]}` too; each is a data set of its own: choose one")


@dataclass
class _World:
    """The hidden truth: effects and vectors by id."""

    user_bias: np.ndarray
    item_bias: np.ndarray
    category_bias: np.ndarray
    user_vectors: np.ndarray
    item_vectors: np.ndarray
    item_category: np.ndarray
    user_cohort: np.ndarray
    hour_by_domain: np.ndarray
    cohort_direction: np.ndarray

    @classmethod
    def draw(cls, config: SyntheticConfig) -> _World:
        rng = np.random.default_rng([config.seed, 0])
        return cls(
            user_bias=rng.normal(0, 0.5, config.users),
            item_bias=rng.normal(0, 0.6, config.items),
            category_bias=rng.normal(0, 0.3, config.categories),
            user_vectors=rng.normal(0, 1, (config.users, _FACTORS)),
            item_vectors=rng.normal(0, 1, (config.items, _FACTORS)),
            item_category=rng.integers(0, config.categories, config.items),
            user_cohort=rng.integers(0, NUM_COHORTS, config.users),
            hour_by_domain=rng.normal(0, 0.4, (len(_DOMAIN_SHARES), NUM_HOURS)),
            cohort_direction=rng.normal(0, 0.7, (NUM_COHORTS // 2, _FACTORS)),
        )

    def rows(
        self, rng: np.random.Generator, user: np.ndarray, item: np.ndarray, first_row: int
    ) -> tuple[pa.Table, None]:
        """A table with the given (n,) users and items; what is behind it is not told."""
        count = len(user)
        hour = rng.integers(0, NUM_HOURS, count)
        domain = rng.choice(len(_DOMAIN_SHARES), count, p=_DOMAIN_SHARES)
        dense = rng.normal(0, 1, (count, NUM_DENSE))
        lengths = rng.integers(0, _MAX_HISTORY + 1, count)
        history = _history(self, rng, user, lengths)
        logit = _logit(self, user, item, hour, domain, dense) + _likeness(self, item, history, lengths)
        d3 = pa.array(np.exp(dense[:, 3]).astype(np.float32), mask=rng.random(count) < _NULL_SHARE)
        table = pa.table({
            "label": (rng.random(count) < 1 / (1 + np.exp(-logit))).astype(np.float32),
            "row_id": np.arange(first_row, first_row + count),
            **{f"d{i}": dense[:, i].astype(np.float32) for i in range(NUM_DENSE - 1)},
            "d3": d3,
            "user_id": user,
            "item_id": item,
            "category": self.item_category[item],
            "hour": hour,
            "history": pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), history),
            "domain": domain,
            "cohort": self.user_cohort[user],
        })  # fmt: skip
        return table, None


def write(config: SyntheticConfig) -> None:
    """Writes train/, validation/ and test/ under `config.path`, all or nothing; an existing folder is left as it is.

    The rows are a function of the config. Memory: one file's rows; with `domains` or `cohorts` also 32 bytes for each
    row of validation and test, whose best possible scores go to truth.json.
    """
    target = Path(config.path)
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # written beside the target and renamed, so that nobody ever reads half a data set, and of two writers one wins
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        truth = _write_splits(config, temporary)
        if any(truth.values()):
            write_truth(truth, temporary / "truth.json")
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except OSError:
        if not target.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_splits(config: SyntheticConfig, folder: Path) -> dict[str, list[Truth]]:
    """Writes every split below `folder`; returns what is behind the rows of validation and test, if that is kept."""
    world = _world(config)
    if isinstance(world, RetrievalWorld):
        write_items(world, folder)
    truth: dict[str, list[Truth]] = {"validation": [], "test": []}
    first_row = 0
    for split, name in enumerate(SPLITS):
        (folder / name).mkdir()
        rows = config.rows if name == "train" else config.eval_rows
        for number, start in enumerate(range(0, rows, config.rows_per_file)):
            count = min(config.rows_per_file, rows - start)
            rng = np.random.default_rng([config.seed, 1, split, number])
            user, item = _zipf(rng, config.users, count), _zipf(rng, config.items, count)
            table, behind = world.rows(rng, user, item, first_row)
            if behind is not None and name in truth:
                truth[name].append(behind)
            file = folder / name / f"part-{number:05d}.parquet"
            pq.write_table(table, file, row_group_size=config.row_group_rows)
            first_row += count
    return truth


def _world(config: SyntheticConfig) -> _World | DomainsWorld | CohortsWorld | RetrievalWorld:
    if config.retrieval is not None:
        sizes = (config.users, config.items, config.categories)
        return RetrievalWorld(config.retrieval, *sizes, config.rows, config.seed)
    if config.domains is not None:
        return DomainsWorld(config.domains, config.users, config.items, config.categories, config.seed)
    if config.cohorts is not None:
        return CohortsWorld(config.cohorts, _shares(config.users), config.items, config.categories, config.seed)
    return _World.draw(config)


def _zipf(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    """(count,) ids of which a few are frequent; the frequency falls with the rank."""
    return np.searchsorted(np.cumsum(_shares(size)), rng.random(count)).clip(max=size - 1)


def _shares(size: int) -> np.ndarray:
    """(size,) of each id in the rows."""
    share = 1 / np.arange(1, size + 1) ** 0.9
    return share / share.sum()


def _history(world: _World, rng: np.random.Generator, user: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(sum of lengths,) items: of some popular candidates, the one nearest to the user's hidden vector."""
    candidates = _zipf(rng, len(world.item_bias), 3 * int(lengths.sum())).reshape(-1, 3)
    owner = world.user_vectors[np.repeat(user, lengths)]
    nearness = np.einsum("nf,ncf->nc", owner, world.item_vectors[candidates])
    return candidates[np.arange(len(candidates)), nearness.argmax(axis=1)]


def _likeness(world: _World, item: np.ndarray, history: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(n,) how near the item is to the mean of the history, 0 for an empty one."""
    row = np.repeat(np.arange(len(item)), lengths)
    nearness = (world.item_vectors[history] * world.item_vectors[item[row]]).sum(axis=1)
    return 0.3 * np.bincount(row, nearness, minlength=len(item)) / np.maximum(lengths, 1)


def _logit(
    world: _World, user: np.ndarray, item: np.ndarray, hour: np.ndarray, domain: np.ndarray, dense: np.ndarray
) -> np.ndarray:
    cohort = world.user_cohort[user]
    sign = np.where(cohort % 2 == 0, 1.0, -1.0)
    return (
        -1.0
        - 0.4 * domain
        + world.user_bias[user]
        + world.item_bias[item]
        + world.category_bias[world.item_category[item]]
        + world.hour_by_domain[domain, hour]
        + 0.6 * (world.user_vectors[user] * world.item_vectors[item]).sum(axis=1)
        + sign * (world.cohort_direction[cohort // 2] * world.item_vectors[item]).sum(axis=1)
        + 0.5 * dense[:, 0]
        - 0.3 * dense[:, 1]
        + 0.4 * dense[:, 2] * sign
        + 0.2 * dense[:, 3]
    )
