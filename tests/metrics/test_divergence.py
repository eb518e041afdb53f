"""Divergences by hand, their bounds and symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_rec.metrics.divergence import (
    MEASURES,
    SMOOTHING,
    cosine_distance,
    divergence_matrix,
    js_divergence,
    kl_divergence,
    wasserstein_distance,
)


def draw(seed: int, bins: int = 20) -> np.ndarray:
    """Counts, some of them 0."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 50, bins) * rng.integers(0, 2, bins)


def test_js_by_hand() -> None:
    # middle: (1/2, 1/2, 0) against shares (1, 0, 0) and (0, 1, 0), and (1/4, 3/4) against (1/2, 1/2) and (0, 1)
    assert js_divergence([3, 0, 0], [0, 7, 0]) == pytest.approx(math.log(2), rel=1e-15)
    expected = (0.5 * math.log(2) + 0.5 * math.log(2 / 3) + math.log(4 / 3)) / 2
    assert js_divergence([5, 5], [0, 2]) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("seed", range(5))
def test_js_is_0_for_equal_symmetric_and_at_most_ln_2(seed: int) -> None:
    p, q = draw(2 * seed), draw(2 * seed + 1)
    assert js_divergence(p, p) == 0
    assert js_divergence(p, 10 * p) == pytest.approx(0, abs=1e-15)
    assert js_divergence(p, q) == pytest.approx(js_divergence(q, p), rel=1e-13)
    assert 0 < js_divergence(p, q) <= math.log(2)


def test_js_of_samples_of_one_distribution_is_as_much_too_high_as_the_module_says() -> None:
    rng, share = np.random.default_rng(0), np.full(30, 1 / 30)
    found = [js_divergence(rng.multinomial(1000, share), rng.multinomial(4000, share)) for _ in range(400)]
    assert np.mean(found) == pytest.approx(29 / 8 * (1 / 1000 + 1 / 4000), rel=0.05)


def test_kl_by_hand_with_its_smoothing() -> None:
    a, b = np.array([3.5, 0.5]) / 4, np.array([1.5, 2.5]) / 4
    assert SMOOTHING == 0.5
    expected = float((a * np.log(a / b)).sum())
    assert kl_divergence([3, 0], [1, 2]) == pytest.approx(expected, rel=1e-14)
    assert kl_divergence([1, 2], [3, 0]) == pytest.approx(float((b * np.log(b / a)).sum()), rel=1e-14)
    assert kl_divergence([1, 2], [3, 0]) != pytest.approx(kl_divergence([3, 0], [1, 2]), rel=0.1)
    assert kl_divergence([4, 1], [4, 1]) == 0


@pytest.mark.parametrize("shift", [1, 3, 7])
def test_wasserstein_of_a_shifted_distribution_is_the_shift(shift: int) -> None:
    p = np.concatenate([draw(3), np.zeros(10)])
    assert wasserstein_distance(p, np.roll(p, shift), 0.2) == pytest.approx(0.2 * shift, rel=1e-12)
    assert wasserstein_distance(p, p) == 0
    # half of the mass travels 2 bins
    assert wasserstein_distance([1, 0, 0], [1, 0, 1]) == pytest.approx(1, rel=1e-15)


def test_cosine_by_hand() -> None:
    assert cosine_distance([1, 1], [1, 0]) == pytest.approx(1 - 1 / math.sqrt(2), rel=1e-14)
    assert cosine_distance([2, 0], [0, 9]) == 1
    assert cosine_distance([1, 2], [10, 20]) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("measure", list(MEASURES))
def test_the_matrix_holds_each_pair(measure: str) -> None:
    histograms = [draw(seed) for seed in range(4)]
    matrix = divergence_matrix(histograms, measure, 0.5)
    assert matrix.shape == (4, 4) and np.diag(matrix).tolist() == [0] * 4
    assert matrix[1, 3] == MEASURES[measure](histograms[1], histograms[3], 0.5)
    assert matrix[3, 1] == MEASURES[measure](histograms[3], histograms[1], 0.5)
    assert np.allclose(matrix, matrix.T, rtol=1e-12) == (measure != "kl")
    # how the histograms are numbered does not matter
    order = [2, 0, 3, 1]
    moved = divergence_matrix([histograms[i] for i in order], measure, 0.5)
    assert np.array_equal(moved, matrix[np.ix_(order, order)])
