"""The log with planted cohorts: their masses, what labels show of them, and the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.data.synthetic import SPLITS, SyntheticConfig, write
from dist_rec.data.synthetic_cohorts import HEAD, MAJORITY, SEGMENTS, SKEW, TAIL, CohortsWorld, PlantedCohorts
from dist_rec.data.synthetic_domains import DomainsConfig

USERS, ITEMS, CATEGORIES = 1000, 200, 20
SHARES = np.arange(1, USERS + 1) ** -SKEW / (np.arange(1, USERS + 1) ** -SKEW).sum()


def draw(n: int, **settings: Any) -> tuple[CohortsWorld, pa.Table]:
    hidden = CohortsWorld(PlantedCohorts(**settings), SHARES, ITEMS, CATEGORIES, seed=3)
    rng = np.random.default_rng(7)
    rows, truth = hidden.rows(rng, rng.choice(USERS, n, p=SHARES), rng.integers(0, ITEMS, n), first_row=0)
    assert np.array_equal(truth.domain, rows["planted"].to_numpy())
    return hidden, rows


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_cohorts_are_the_ends_of_the_users_values_with_the_given_mass(share: float) -> None:
    hidden, rows = draw(100_000, share=share)
    planted, value = rows["planted"].to_numpy(), rows["value"].to_numpy()
    assert (np.bincount(planted) / len(rows)).tolist() == pytest.approx([share, 1 - 2 * share, share], abs=0.006)
    assert value[planted == TAIL].max() < value[planted == MAJORITY].min()
    assert value[planted == HEAD].min() > value[planted == MAJORITY].max()
    assert min(np.bincount(hidden.cohort)) > 30 * share / 0.05  # many users, not one


def test_segments_are_twentieths_of_the_rows_and_the_ends_are_the_cohorts() -> None:
    hidden, rows = draw(100_000)
    counts = np.bincount(rows["segment"].to_numpy()) / len(rows)
    assert len(counts) == SEGMENTS and np.median(counts) == pytest.approx(0.05, abs=0.01)
    assert ((hidden.segment == 0) == (hidden.cohort == TAIL)).all()
    assert ((hidden.segment == SEGMENTS - 1) == (hidden.cohort == HEAD)).all()


def test_labels_show_opposite_tastes_in_the_cohorts_and_none_elsewhere() -> None:
    hidden, rows = draw(300_000, shift=0.8, strength=1.5)
    planted, category, label = (rows[n].to_numpy() for n in ("planted", "category", "label"))
    for cohort, sign in ((TAIL, -1), (MAJORITY, 0), (HEAD, 1)):
        here = planted == cohort
        count = np.bincount(category[here], minlength=CATEGORIES)
        rate = np.bincount(category[here], label[here], minlength=CATEGORIES) / count
        slope = np.polyfit(hidden.taste, np.log(rate / (1 - rate)), 1, w=np.sqrt(count))[0]
        # a logit averaged over users and items is flatter than that of one
        assert slope == pytest.approx(sign * 1.25, abs=0.3)
    rates = [label[planted == cohort].mean() for cohort in (TAIL, MAJORITY, HEAD)]
    assert rates[2] > max(rates[:2]) + 0.1
    assert abs(np.average(hidden.taste[hidden.category])) < 1e-9


def test_written_files_are_a_function_of_the_config_with_the_best_scores_by_cohort(tmp_path: Path) -> None:
    ids = {"users": USERS, "items": ITEMS, "categories": CATEGORIES}
    sizes = {"rows": 2000, "eval_rows": 1000, "rows_per_file": 700, "cohorts": PlantedCohorts(), **ids}
    for name in "ab":
        write(SyntheticConfig(path=str(tmp_path / name), **sizes))
    tables = [[pq.read_table(tmp_path / name / split) for split in SPLITS] for name in "ab"]
    assert all(x.equals(y) for x, y in zip(*tables, strict=True))
    truth = json.loads((tmp_path / "a" / "truth.json").read_text())["test"]
    assert list(truth) == ["all", "0", "1", "2"] and truth["all"]["rows"] == 1000


def test_complaints_name_the_key() -> None:
    assert [c.key for c in SyntheticConfig(cohorts=PlantedCohorts(share=0.5)).check()] == ["cohorts.share"]
    both = SyntheticConfig(cohorts=PlantedCohorts(), domains=DomainsConfig())
    assert [c.key for c in both.check()] == ["cohorts"]
