"""The log of several domains: its imbalance, its planted interests as labels show them, its best possible scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.data.synthetic import SPLITS, SyntheticConfig, write
from dist_rec.data.synthetic_domains import DomainsConfig, DomainsWorld, write_truth
from dist_rec.metrics.binary import auc, normalized_entropy

IDS = {"users": 300, "items": 200, "categories": 20}


def world(**settings: Any) -> DomainsWorld:
    return DomainsWorld(DomainsConfig(**settings), seed=3, **IDS)


def draw(hidden: DomainsWorld, n: int) -> tuple[pa.Table, Any]:
    rng = np.random.default_rng(7)
    user, item = rng.integers(0, IDS["users"], n), rng.integers(0, IDS["items"], n)
    return hidden.rows(rng, user, item, first_row=0)


def logistic_regression(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and their standard errors, by Newton's method."""
    w = np.zeros(x.shape[1])
    for _ in range(20):
        p = 1 / (1 + np.exp(-x @ w))
        hessian = x.T @ (x * (p * (1 - p))[:, None])
        w = w + np.linalg.solve(hessian, x.T @ (y - p))
    return w, np.sqrt(np.diag(np.linalg.inv(hessian)))


@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_labels_show_the_planted_interests_and_no_others(shared: float) -> None:
    hidden = world(sizes=[1.0, 1.0, 1.0], shared=shared)
    rows, _ = draw(hidden, 60_000)
    user, item, domain, label = (rows[n].to_numpy() for n in ("user_id", "item_id", "domain", "label"))
    for s in range(3):
        here = domain == s
        u, i = user[here], item[here]
        interests = [hidden.interest(which, u, i) for which in ("common", "contested", s, (s + 1) % 3)]
        known = hidden.user_bias[u] + hidden.item_bias[i]
        x = np.stack([*interests, known, np.ones(len(u))], axis=1)
        found, errors = logistic_regression(x, label[here])
        common, sign = 1.5 * np.sqrt(shared / 2), (1 if s % 2 == 0 else -1)
        expected = [common, sign * common, 1.5 * np.sqrt(1 - shared), 0, 1, hidden.domain_bias[s]]
        assert (np.abs(found - expected) < 4.5 * errors).all(), (s, found, expected, errors)
        assert (errors < 0.05).all(), "too few rows to say anything"


def test_interests_have_variance_one_of_which_half_is_of_the_groups() -> None:
    hidden = DomainsWorld(DomainsConfig(), users=20_000, items=20_000, categories=500, seed=0)
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 20_000, 200_000), rng.integers(0, 20_000, 200_000)
    for which in ("common", "contested", 0, 4):
        assert np.var(hidden.interest(which, user, item)) == pytest.approx(1, abs=0.15)  # 40 segments: they vary
    vectors, group = hidden._items[0], hidden.category
    centre = np.stack([np.bincount(group, column) for column in vectors.T], axis=1) / np.bincount(group)[:, None]
    assert np.var(centre[group]) / np.var(vectors) == pytest.approx(0.5, abs=0.06)


def test_domains_are_as_unequal_as_the_tabs_of_kuairand() -> None:
    rows, _ = draw(world(), 200_000)
    counts = np.bincount(rows["domain"].to_numpy())
    assert len(counts) == 5
    assert counts[0] / counts[4] == pytest.approx(13.1, rel=0.1)
    assert counts[1] / len(rows) == pytest.approx(0.666, abs=0.005)


def test_truth_says_what_the_metrics_say_of_the_true_log_odds(tmp_path: Path) -> None:
    rows, truth = draw(world(sizes=[3.0, 1.0]), 20_000)  # repeats users, items and domains: there are ties
    assert len(set(truth.logit)) < 20_000
    assert np.array_equal(truth.label, rows["label"].to_numpy())
    half = [type(truth)(*(part[cut] for part in truth)) for cut in (slice(0, 9_000), slice(9_000, None))]
    write_truth({"test": half}, tmp_path / "truth.json")
    found = json.loads((tmp_path / "truth.json").read_text())["test"]
    assert list(found) == ["all", "0", "1"]
    for name, here in [("all", np.ones(20_000, bool)), ("0", truth.domain == 0), ("1", truth.domain == 1)]:
        z, shared, y, w = truth.logit[here], truth.shared[here], truth.label[here], np.ones(here.sum())
        assert found[name]["rows"] == here.sum()
        assert found[name]["positives"] == pytest.approx(y.mean())
        assert found[name]["auc"] == pytest.approx(auc(z, y, w), rel=1e-12)
        assert found[name]["auc_shared"] == pytest.approx(auc(shared, y, w), rel=1e-12)
        assert found[name]["ne"] == pytest.approx(normalized_entropy(z, y, w), rel=1e-12)
        assert 0.5 < found[name]["auc_shared"] < found[name]["auc"] - 0.02


def test_without_own_interests_the_shared_part_is_all() -> None:
    _, truth = draw(world(shared=1.0), 5_000)
    assert np.array_equal(truth.shared, truth.logit)


def test_a_domain_with_one_class_has_no_score(tmp_path: Path) -> None:
    _, truth = draw(world(sizes=[1.0]), 50)
    write_truth({"test": [truth._replace(label=np.zeros(50, bool))]}, tmp_path / "truth.json")
    assert json.loads((tmp_path / "truth.json").read_text())["test"]["0"]["auc"] is None


def test_written_files_are_a_function_of_the_config_and_of_the_truth_beside_them(tmp_path: Path) -> None:
    sizes = {"rows": 3000, "eval_rows": 700, "rows_per_file": 500, "domains": DomainsConfig(), **IDS}
    for name in "ab":
        write(SyntheticConfig(path=str(tmp_path / name), **sizes))
    tables = [[pq.read_table(tmp_path / name / split) for split in SPLITS] for name in "ab"]
    assert all(x.equals(y) for x, y in zip(*tables, strict=True))
    ids = np.concatenate([t["row_id"].to_numpy() for t in tables[0]])
    assert sorted(ids) == list(range(3000 + 2 * 700))
    truth = json.loads((tmp_path / "a" / "truth.json").read_text())
    assert list(truth) == ["validation", "test"]
    for split, table in zip(SPLITS[1:], tables[0][1:], strict=True):
        assert truth[split]["all"]["rows"] == 700
        assert truth[split]["all"]["positives"] == pytest.approx(table["label"].to_numpy().mean())
        assert table["segment"].to_numpy().max() < 40 and table["category"].to_numpy().max() < IDS["categories"]


def test_complaints_name_the_key() -> None:
    config = SyntheticConfig(domains=DomainsConfig(sizes=[1.0, 0.0], shared=1.5))
    assert [c.key for c in config.check()] == ["domains.sizes", "domains.shared"]
    assert [c.key for c in DomainsConfig(sizes=[]).check()] == ["sizes"]
