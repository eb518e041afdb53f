"""Cohort metrics by hand, and differences: by definition, with intervals that cover and that know what is dependent."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dist_rec.metrics import compare
from dist_rec.metrics.binary import log_loss, normalized_entropy
from dist_rec.metrics.compare import cohort_metrics, ne_differences, resampled_sums

RNG = np.random.default_rng


def logit(p: float) -> float:
    return math.log(p / (1 - p))


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def test_ne_of_a_cohort_by_both_base_rates() -> None:
    # four rows in the cohort (one positive, weights 1, 1, 1 and 2), three others: 3 of 8 in all
    z = np.array([logit(0.25)] * 4 + [logit(0.5)] * 3)
    y, w = np.array([1, 0, 0, 0, 1, 1, 0]), np.array([1, 1, 1, 2, 1, 1, 1])
    mask = np.array([True] * 4 + [False] * 3)
    found = cohort_metrics(z, y, w, {"cohort": mask, "all": np.full(7, True)})["cohort"]
    loss = (-math.log(0.25) - 4 * math.log(0.75)) / 5
    assert found.log_loss == pytest.approx(loss, rel=1e-14)
    assert found.ne == pytest.approx(loss / entropy(1 / 5), rel=1e-14)
    assert found.ne_global == pytest.approx(loss / entropy(3 / 8), rel=1e-14)
    assert found.calibration == pytest.approx(0.25 * 5 / 1, rel=1e-14) and found.auc == 0.5


def test_over_all_rows_both_base_rates_are_one() -> None:
    z, y = RNG(0).normal(size=50), RNG(1).integers(0, 2, 50)
    found = cohort_metrics(z, y, np.ones(50), {"all": np.full(50, True)})["all"]
    assert found.ne == found.ne_global == normalized_entropy(z, y, np.ones(50))
    constant = cohort_metrics(np.full(50, logit(y.mean())), y, np.ones(50), {"all": np.full(50, True)})["all"]
    assert constant.ne == pytest.approx(1, rel=1e-14)


def test_a_cohort_of_one_class_has_only_what_it_defines() -> None:
    y = np.array([0, 0, 1, 1])
    found = cohort_metrics(np.zeros(4), y, np.ones(4), {"none": y == 0, "empty": np.full(4, False)})
    assert math.isnan(found["none"].ne) and math.isnan(found["none"].auc)
    assert found["none"].ne_global == pytest.approx(1, rel=1e-14)
    assert all(math.isnan(value) for value in found["empty"])


def draw(seed: int, n: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A baseline's logits, those of a run that is a little better, and labels."""
    rng = RNG(seed)
    x, noise = rng.normal(size=(2, n))
    y = (rng.random(n) < 1 / (1 + np.exp(1 - x))).astype(float)
    return x - 1 + 0.5 * noise, x - 1 + 0.35 * noise, y


def test_the_difference_is_that_of_ne_by_any_base_rate() -> None:
    base, run, y = draw(0)
    w, mask = RNG(1).uniform(0.5, 2, len(y)), RNG(2).random(len(y)) < 0.3
    masks = {"all": np.full(len(y), True), "some": mask}
    found = ne_differences([base, run, base], y, w, masks)
    metrics = [cohort_metrics(z, y, w, masks) for z in (base, run)]
    for name in masks:
        better, same = found[name]
        for kind in ("ne", "ne_global"):
            first, second = (getattr(m[name], kind) for m in metrics)
            assert better.value == pytest.approx((second - first) / first, rel=1e-9)
        assert better.low < better.value < better.high
        assert same == (0, 0, 0)
    assert log_loss(run, y, w) < log_loss(base, y, w) and found["all"][0].value < 0


def test_a_fixed_seed_gives_the_same_interval_and_another_seed_nearly_so() -> None:
    base, run, y = draw(0, 2000)
    masks = {"all": np.full(len(y), True)}
    one, again, other = (
        ne_differences([base, run], y, np.ones(len(y)), masks, seed=seed)["all"][0] for seed in (3, 3, 4)
    )
    assert one == again and one != other
    assert other.high - other.low == pytest.approx(one.high - one.low, rel=0.1)


def test_the_interval_covers() -> None:
    """Over 300 samples, 95 % intervals hold the difference in a population of two million rows."""
    base, run, y = draw(1000, 2_000_000)
    truth = (log_loss(run, y, np.ones(len(y))) - log_loss(base, y, np.ones(len(y)))) / log_loss(
        base, y, np.ones(len(y))
    )
    hits = []
    for seed in range(300):
        base, run, y = draw(seed)
        found = ne_differences([base, run], y, np.ones(len(y)), {"all": np.full(len(y), True)}, replicates=300)
        hits.append(found["all"][0].low <= truth <= found["all"][0].high)
    # a share of 0.95 has a standard error of 0.0126 here
    assert 0.91 <= np.mean(hits) <= 0.985


def test_units_are_drawn_whole() -> None:
    """Each row four times, as one user's: as many independent units as before, so the same interval."""
    base, run, y = draw(0, 1000)
    four = [np.repeat(a, 4) for a in (base, run, y)]
    once = ne_differences([base, run], y, np.ones(1000), {"all": np.full(1000, True)})["all"][0]
    masks, users = {"all": np.full(4000, True)}, np.repeat(np.arange(1000) * 7 + 10**12, 4)
    by_user = ne_differences(four[:2], four[2], np.ones(4000), masks, units=users)["all"][0]
    by_row = ne_differences(four[:2], four[2], np.ones(4000), masks)["all"][0]
    assert by_user == pytest.approx(once, rel=1e-9)
    assert (by_user.high - by_user.low) / (by_row.high - by_row.low) == pytest.approx(2, rel=0.15)


@pytest.mark.parametrize(("units", "has_interval"), [(25, True), (19, False), (1, False)])
def test_few_units_have_a_difference_and_no_interval(units: int, has_interval: bool) -> None:
    base, run, y = draw(0, 1000)
    base = np.where(y == 1, -1.0, 1.0) * np.abs(base[0])  # every row has the same loss, every unit as many rows
    masks = {"all": np.full(1000, True)}
    found = ne_differences([base, run], y, np.ones(1000), masks, units=np.arange(1000) % units)["all"][0]
    assert math.isfinite(found.value)
    assert math.isnan(found.low) == math.isnan(found.high) == (not has_interval)


def test_a_unit_that_outweighs_all_others_leaves_no_interval() -> None:
    """As where many users have one id, that of users who are not known."""
    base, run, y = draw(0, 1000)
    users = np.where(np.arange(1000) < 800, 0, np.arange(1000))
    found = ne_differences([base, run], y, np.ones(1000), {"all": np.full(1000, True)}, units=users)["all"][0]
    assert math.isfinite(found.value) and math.isnan(found.low) and math.isnan(found.high)


def test_more_units_than_are_drawn_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    base, run, y = draw(0, 6000)
    masks = {"all": np.full(6000, True)}
    exact = ne_differences([base, run], y, np.ones(6000), masks, replicates=2000)["all"][0]
    monkeypatch.setattr(compare, "MAX_UNITS", 500)
    joined = ne_differences([base, run], y, np.ones(6000), masks, replicates=2000)["all"][0]
    assert joined.value == pytest.approx(exact.value, rel=1e-9) and joined != exact
    assert joined.high - joined.low == pytest.approx(exact.high - exact.low, rel=0.15)


def test_resampled_sums_have_the_bootstraps_mean_and_variance() -> None:
    sums = RNG(0).normal(2, 1, (300, 2))
    drawn = resampled_sums(sums, 4000)
    assert drawn.shape == (4000, 2)
    np.testing.assert_allclose(drawn.mean(axis=0), sums.sum(axis=0), rtol=0.003)
    np.testing.assert_allclose(drawn.var(axis=0), 300 * sums.var(axis=0), rtol=0.08)
    # rows are drawn whole: the columns stay together
    together = resampled_sums(np.repeat(sums[:, :1], 2, axis=1), 10)
    assert np.array_equal(together[:, 0], together[:, 1])


def test_a_cohort_without_rows_has_no_difference() -> None:
    base, run, y = draw(0)
    (found,) = ne_differences([base, run], y, np.ones(len(y)), {"none": np.full(len(y), False)})["none"]
    assert all(math.isnan(value) for value in found)
