"""Runs compared on the same rows: metrics of cohorts, and differences with intervals from a paired bootstrap.

Letters: n rows, in the same order for all runs; u units that are resampled; c columns; R replicates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_rec.metrics.binary import auc, calibration, log_loss, normalized_entropy, row_losses

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

MAX_UNITS = 20_000
"""More units than this are joined at random before they are resampled, so that the cost does not grow with the rows."""
FEWEST_UNITS = 20
"""With fewer there is no interval: replicates of a few units vary far less than another sample would."""
LEVEL = 0.95
"""Of every interval."""
_AT_ONCE = 50  # replicates in one matrix product


class CohortMetrics(NamedTuple):
    """What a run does on some rows; a metric that they cannot define is nan.

    ne: normalised entropy by the base rate of these rows. ne_global: by the base rate of all rows.
    """

    ne: float
    ne_global: float
    log_loss: float
    auc: float
    calibration: float


def cohort_metrics(
    logits: ArrayLike, labels: ArrayLike, weights: ArrayLike, masks: Mapping[str, Mask]
) -> dict[str, CohortMetrics]:
    """The metrics of each cohort. logits, labels, weights: (n,). masks: name -> (n,), which rows are in the cohort."""
    z, y, w = (np.asarray(a, np.float64) for a in (logits, labels, weights))
    overall = float((w * y).sum() / w.sum())
    result = {}
    for name, mask in masks.items():
        rows = z[mask], y[mask], w[mask]
        result[name] = CohortMetrics(
            ne=normalized_entropy(*rows),
            ne_global=normalized_entropy(*rows, base_rate=overall),
            log_loss=log_loss(*rows),
            auc=auc(*rows),
            calibration=calibration(*rows),
        )
    return result


class Difference(NamedTuple):
    """(NE of a run - NE of the baseline) / NE of the baseline, negative where the run is better; and its interval."""

    value: float
    low: float
    high: float


def ne_differences(
    runs: Sequence[ArrayLike],
    labels: ArrayLike,
    weights: ArrayLike,
    masks: Mapping[str, Mask],
    *,
    units: ArrayLike | None = None,
    replicates: int = 1000,
    seed: int = 0,
) -> dict[str, list[Difference]]:
    """cohort -> the difference of each run but the first to the first, the baseline, with its interval at `LEVEL`.

    The interval is that of a paired bootstrap (percentiles): units are drawn with replacement from those of all rows,
    the same ones for every run and cohort, so what makes a row hard for both runs cancels. NE's denominator, the
    entropy of a base rate, cancels in each replicate too: all of it is a ratio of sums of losses. A cohort without loss
    in the baseline gives nan; one whose loss lies with fewer than `FEWEST_UNITS` units has no interval (nan). Units are
    counted by Kish's effective number, as one that outweighs all others leaves little of them.

    Args:
        runs: the logits of each, (n,). labels, weights: (n,). masks: cohort -> (n,).
        units: (n,) integers, what is resampled together, for example user ids; by default each row on its own. Rows of
            one user are not independent: intervals by row are then too narrow.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapters 8 and 13; Kish 1965, "Survey
    Sampling", section 8.2.
    """
    y, w = np.asarray(labels, np.float64), np.asarray(weights, np.float64)
    base = w * row_losses(runs[0], y)
    extra = [w * row_losses(logits, y) - base for logits in runs[1:]]
    unit, count = _units(len(y), units, seed)
    columns = [np.bincount(unit, loss * mask, minlength=count) for mask in masks.values() for loss in (base, *extra)]
    sums = np.asarray(columns, np.float64).T
    drawn = resampled_sums(sums, replicates, seed)
    result: dict[str, list[Difference]] = {}
    for i, name in enumerate(masks):
        here = slice(i * len(runs), (i + 1) * len(runs))
        enough = _effective(sums[:, here.start]) >= FEWEST_UNITS
        result[name] = [
            _difference(float(whole[1]) / float(whole[0]) if whole[0] else np.nan, ratio if enough else ratio[:0])
            for whole, ratio in _ratios(sums.sum(axis=0)[here], drawn[:, here])
        ]
    return result


def resampled_sums(sums: Array, replicates: int, seed: int = 0) -> Array:
    """(R, c): the sums of each column of `sums` (u, c) over u of its rows, drawn with replacement anew each time."""
    rng, count = np.random.default_rng([seed, 1]), len(sums)
    parts = []
    for start in range(0, replicates, _AT_ONCE):
        draws = rng.integers(0, count, (min(_AT_ONCE, replicates - start), count))
        times = np.stack([np.bincount(draw, minlength=count) for draw in draws])
        parts.append(times @ sums)
    return np.concatenate(parts)


def _effective(sums: Array) -> float:
    """(u,) -> how many equal units would vary as much in their sum; 0 if there is nothing to sum."""
    square = float(sums @ sums)
    return float(sums.sum()) ** 2 / square if square else 0.0


def _ratios(whole: Array, drawn: Array) -> list[tuple[Array, Array]]:
    """For each run but the first: (its sums of the baseline's loss and of the extra loss, (R,) ratios)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return [(whole[[0, j]], drawn[:, j] / drawn[:, 0]) for j in range(1, len(whole))]


def _difference(value: float, ratios: Array) -> Difference:
    tail = (1 - LEVEL) / 2
    usable = ratios[np.isfinite(ratios)]  # a replicate may miss a small cohort
    low, high = np.quantile(usable, [tail, 1 - tail]) if len(usable) else (np.nan, np.nan)
    return Difference(value, float(low), float(high))


def _units(rows: int, units: ArrayLike | None, seed: int) -> tuple[NDArray[np.int64], int]:
    """((n,) the unit of each row, from 0; how many there are, at most `MAX_UNITS`)."""
    codes = np.arange(rows) if units is None else np.unique(np.asarray(units), return_inverse=True)[1]
    count = int(codes.max()) + 1
    if count <= MAX_UNITS:
        return codes, count
    joined = np.random.default_rng([seed, 0]).permutation(count) % MAX_UNITS
    return joined[codes], MAX_UNITS
