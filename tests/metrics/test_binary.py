"""Metrics against definitions spelled out pair by pair, hand-computed numbers, torchrec and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc
from torchrec.metrics.ne import compute_ne, get_ne_states

from dist_rec.metrics.binary import auc, calibration, grouped_auc, log_loss, normalized_entropy


def draw(seed: int, n: int = 300, ties: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n).astype(np.float32)
    return (z.round(1) if ties else z), rng.integers(0, 2, n), rng.uniform(0.1, 3, n)


def auc_by_pairs(z: np.ndarray, y: np.ndarray, w: np.ndarray) -> float:
    """Every (positive, negative) pair, one by one: O(n^2)."""
    wins = total = 0.0
    for i in np.flatnonzero(y == 1):
        for j in np.flatnonzero(y == 0):
            wins += w[i] * w[j] * (1.0 if z[i] > z[j] else 0.5 if z[i] == z[j] else 0.0)
            total += w[i] * w[j]
    return wins / total


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [True, False])
def test_auc_equals_counting_pairs(seed: int, ties: bool) -> None:
    z, y, w = draw(seed, ties=ties)
    assert auc(z, y, w) == pytest.approx(auc_by_pairs(z, y, w), rel=1e-12)


def test_auc_equals_torchmetrics_with_ties() -> None:
    z, y, _ = draw(1, n=5000)
    expected = binary_auroc(torch.from_numpy(z).sigmoid(), torch.from_numpy(y)).item()
    assert auc(z, y, np.ones(len(z))) == pytest.approx(expected, abs=1e-6)


def test_auc_of_known_orders() -> None:
    one = np.ones(4)
    assert auc([1, 2, 3, 4], [0, 0, 1, 1], one) == 1.0
    assert auc([4, 3, 2, 1], [0, 0, 1, 1], one) == 0.0
    assert auc([7, 7, 7, 7], [0, 0, 1, 1], one) == 0.5
    assert auc([1, 2, 2], [0, 0, 1], [1, 3, 1]) == (1 + 3 * 0.5) / 4


def test_metrics_do_not_depend_on_row_order() -> None:
    z, y, w = draw(2, n=20_000)
    groups = np.random.default_rng(0).integers(0, 500, len(z))
    order = np.random.default_rng(1).permutation(len(z))
    for metric in (auc, log_loss, normalized_entropy, calibration):
        assert metric(z[order], y[order], w[order]) == pytest.approx(metric(z, y, w), rel=1e-12)
    shuffled = grouped_auc(z[order], y[order], w[order], groups[order])
    assert shuffled == pytest.approx(grouped_auc(z, y, w, groups), rel=1e-12)


def test_grouped_auc_equals_a_loop_and_skips_groups_of_one_class() -> None:
    z, y, w = draw(3, n=400)
    groups = np.random.default_rng(3).integers(-4, 40, len(z)) * 10**12  # ids of any size and sign
    groups[:5], y[:5] = 77, 1  # only positives
    groups[5:9], y[5:9] = 78, 0  # only negatives
    groups[9] = 79  # a single row
    wins = impressions = 0.0
    for g in set(groups) - {77, 78, 79}:
        m = groups == g
        if len(set(y[m])) == 2:
            wins += w[m].sum() * auc_by_pairs(z[m], y[m], w[m])
            impressions += w[m].sum()
    assert grouped_auc(z, y, w, groups) == pytest.approx(wins / impressions, rel=1e-12)


def test_grouped_auc_weighs_by_impressions() -> None:
    # Group 0: AUC 1 with 2 rows; group 1: AUC 0 with 2 rows of weight 3. A plain mean would be 0.5.
    assert grouped_auc([1, 0, 0, 1], [1, 0, 1, 0], [1, 1, 3, 3], [0, 0, 1, 1]) == 2 / 8


def test_log_loss_and_calibration_by_hand() -> None:
    z, y, w = [math.log(3), 0.0], [1, 0], [1, 3]  # p = 3/4 and 1/2
    assert log_loss(z, y, w) == pytest.approx((math.log(4 / 3) + 3 * math.log(2)) / 4, rel=1e-14)
    assert calibration(z, y, w) == pytest.approx((0.75 + 1.5) / 1, rel=1e-14)


def test_log_loss_keeps_what_probabilities_lose() -> None:
    assert log_loss([800.0], [0], [1]) == 800.0
    assert log_loss([50.0], [1], [1]) == pytest.approx(math.exp(-50), rel=1e-12)
    assert calibration([-50.0, 0.0], [0, 1], [1, 0.5]) == pytest.approx(0.5, rel=1e-12)


def test_ne_of_the_base_rate_is_one_and_equals_torchrec() -> None:
    z, y, w = draw(4)
    rate = (w * y).sum() / w.sum()
    constant = np.full(len(z), math.log(rate / (1 - rate)))
    assert normalized_entropy(constant, y, w) == pytest.approx(1, rel=1e-12)
    labels, weights = torch.from_numpy(y).double()[None], torch.from_numpy(w)[None]
    states = get_ne_states(labels, torch.from_numpy(z).double().sigmoid()[None], weights, 1e-12)
    expected = compute_ne(
        states["cross_entropy_sum"], states["weighted_num_samples"], states["pos_labels"], states["neg_labels"], 1e-12
    )
    assert normalized_entropy(z, y, w) == pytest.approx(expected.item(), rel=1e-10)


def test_rows_of_weight_zero_do_not_count() -> None:
    z, y, w = draw(5)
    groups = np.arange(len(z)) % 7
    padded = [np.append(a, b) for a, b in ((z, [9.0, -9.0]), (y, [0, 1]), (w, [0, 0]))]
    for metric in (auc, log_loss, normalized_entropy, calibration):
        assert metric(*padded) == pytest.approx(metric(z, y, w), rel=1e-12)
    assert grouped_auc(*padded, np.append(groups, [1, 999])) == pytest.approx(grouped_auc(z, y, w, groups), rel=1e-12)


def test_undefined_is_nan_without_warnings(recwarn: pytest.WarningsRecorder) -> None:
    one = np.ones(3)
    for y in ([1, 1, 1], [0, 0, 0]):
        assert math.isnan(auc([1, 2, 3], y, one))
        assert math.isnan(normalized_entropy([1, 2, 3], y, one))
        assert math.isnan(grouped_auc([1, 2, 3], y, one, [0, 0, 1]))
        assert math.isfinite(log_loss([1, 2, 3], y, one))
    assert math.isnan(calibration([1, 2, 3], [0, 0, 0], one))
    for metric in (auc, log_loss, normalized_entropy, calibration):
        assert math.isnan(metric([], [], []))
        assert math.isnan(metric([0.0, math.nan, 1.0], [1, 0, 1], one))
        assert math.isnan(metric([0.0, math.inf, 1.0], [1, 0, 1], one))
    assert not recwarn.list
