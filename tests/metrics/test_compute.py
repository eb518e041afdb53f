"""From rows to the reported dictionary: its keys, its parts, and what the settings refuse."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_rec.data.schema import GroupColumn, LabelColumn, Schema, SparseColumn
from dist_rec.metrics.binary import auc, grouped_auc, normalized_entropy
from dist_rec.metrics.compute import MAX_VALUES, MetricsConfig, compute
from dist_rec.metrics.rows import Rows


def make_schema(**labels: LabelColumn) -> Schema:
    groups = {name: GroupColumn(column=name) for name in ("domain", "user")}
    return Schema(labels=labels, sparse={"s": SparseColumn(num_ids=2)}, groups=groups)


def make_rows(n: int = 400, num_labels: int = 1, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    return Rows(
        predictions=rng.normal(size=(n, num_labels)).astype(np.float32),
        labels=rng.integers(0, 2, (n, num_labels)).astype(np.float32),
        weights=rng.uniform(0.5, 2, n).astype(np.float32),
        groups={"domain": rng.integers(-1, 2, n), "user": rng.integers(0, 30, n)},
    )


ONE = make_schema(click=LabelColumn())


def test_keys_of_one_label() -> None:
    result = compute(make_rows(), ONE, MetricsConfig(by=["domain"], grouped_auc=["user"]))
    base = ["ne", "log_loss", "auc", "calibration", "gauc/user"]
    assert list(result) == base + [f"{m}/domain={v}" for v in (-1, 0, 1) for m in base]
    assert all(math.isfinite(v) for v in result.values())


def test_parts_are_the_metrics_of_their_rows() -> None:
    rows = make_rows()
    z, y, w = rows.predictions[:, 0], rows.labels[:, 0], rows.weights
    result = compute(rows, ONE, MetricsConfig(by=["domain"], grouped_auc=["user"]))
    assert result["auc"] == pytest.approx(auc(z, y, w), rel=1e-12)
    m = rows.groups["domain"] == 1
    assert result["ne/domain=1"] == pytest.approx(normalized_entropy(z[m], y[m], w[m]), rel=1e-12)
    expected = grouped_auc(z[m], y[m], w[m], rows.groups["user"][m])
    assert result["gauc/user/domain=1"] == pytest.approx(expected, rel=1e-12)


def test_several_labels_are_prefixed_and_not_mixed() -> None:
    rows = make_rows(num_labels=2)
    result = compute(rows, make_schema(click=LabelColumn(), buy=LabelColumn()), MetricsConfig(by=["domain"]))
    assert {k.split("/")[0] for k in result} == {"click", "buy"}
    assert "buy/auc/domain=0" in result
    assert result["buy/auc"] == pytest.approx(auc(rows.predictions[:, 1], rows.labels[:, 1], rows.weights), rel=1e-12)


def test_real_label_has_the_error_of_the_raw_prediction() -> None:
    rows = Rows(
        predictions=np.array([[1.0], [4.0]], dtype=np.float32),
        labels=np.array([[2.0], [2.0]], dtype=np.float32),
        weights=np.array([1.0, 3.0], dtype=np.float32),
        groups={},
    )
    result = compute(rows, make_schema(rating=LabelColumn(kind="real")), MetricsConfig())
    assert result == {"mse": (1 + 3 * 4) / 4, "calibration": (1 + 12) / 8}


def test_no_rows_are_nan_and_no_error() -> None:
    result = compute(make_rows(0), ONE, MetricsConfig(by=["domain"], grouped_auc=["user"]))
    assert list(result) == ["ne", "log_loss", "auc", "calibration", "gauc/user"]
    assert all(math.isnan(v) for v in result.values())


def test_a_group_of_ids_is_left_out_with_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = make_rows(MAX_VALUES + 1)
    rows.groups["user"] = np.arange(MAX_VALUES + 1)
    assert compute(rows, ONE, MetricsConfig(by=["user"])) == compute(rows, ONE, MetricsConfig())
    assert f"'user', which has {MAX_VALUES + 1} values" in caplog.text and "grouped_auc" in caplog.text


def test_settings_are_checked_against_the_schema() -> None:
    assert list(MetricsConfig(by=["domain"], grouped_auc=["user"]).check(ONE)) == []
    bad = MetricsConfig(by=["domian"], grouped_auc=["usr"], window_rows=0)
    found = {c.key: c.text for c in bad.check(ONE)}
    assert "'domian'" in found["by"] and "known: domain, user" in found["by"]
    assert "'usr'" in found["grouped_auc"]
    assert "is 0" in found["window_rows"]


def test_groups_once_and_window_per_rank() -> None:
    config = MetricsConfig(by=["domain", "user"], grouped_auc=["user"], window_rows=10)
    assert config.groups == ["domain", "user"]
    assert [config.rank_window(w) for w in (1, 2, 3)] == [10, 5, 4]
