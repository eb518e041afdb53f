"""Metrics of binary labels, in float64, from logits.

All arguments are (n,) arrays: `logits` (the log-odds that a model gives a row), `labels` (0 or 1), `weights` (the
sample weights, >= 0). A metric that the rows cannot define is nan, never an exception: one class only (AUC, NE), no
positive row (calibration), no row at all, or a logit that is not finite.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def row_losses(logits: ArrayLike, labels: ArrayLike) -> Array:
    """(n,) binary cross-entropy of each row, in nats.

    Computed as ``y * log(1 + exp(-z)) + (1 - y) * log(1 + exp(z))``, exact where probabilities would round to 0 or 1.
    """
    z, y = _float64(logits, labels)
    return y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)


def log_loss(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike) -> float:
    """Weighted mean of `row_losses`."""
    z, y, w = _float64(logits, labels, weights)
    total = w.sum()
    if total == 0 or not np.isfinite(z).all():
        return np.nan
    return float((w * row_losses(z, y)).sum() / total)


def normalized_entropy(
    logits: ArrayLike, labels: ArrayLike, weights: ArrayLike, base_rate: float | None = None
) -> float:
    """Log loss over the entropy of a base rate; lower is better.

    Args:
        base_rate: by default the weighted mean label of these rows, and 1 is then what predicting it always gives. Rows
            that are a part of others (a cohort) may also be held against the mean label of all.
    Source: He et al. 2014, "Practical Lessons from Predicting Clicks on Ads at Facebook", section 2.
    """
    _, y, w = _float64(logits, labels, weights)
    total = w.sum()
    mean = base_rate if base_rate is not None else (w * y).sum() / total if total else np.nan
    if not 0 < mean < 1:
        return np.nan
    return log_loss(logits, labels, weights) / float(-mean * np.log(mean) - (1 - mean) * np.log1p(-mean))


def calibration(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike) -> float:
    """Weighted sum of predicted probabilities over weighted sum of labels: above 1, the model predicts too much."""
    z, y, w = _float64(logits, labels, weights)
    positives = (w * y).sum()
    if positives == 0 or not np.isfinite(z).all():
        return np.nan
    return float((w * np.exp(-np.logaddexp(0, -z))).sum() / positives)


def auc(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike) -> float:
    """Weighted share of (positive, negative) pairs in which the positive row scores higher; ties count half.

    Exact, by one sort: O(n log n). A pair weighs the product of its rows' weights.
    """
    z, y, w = _float64(logits, labels, weights)
    return grouped_auc(z, y, w, np.zeros(z.shape, dtype=np.int64))


def grouped_auc(logits: ArrayLike, labels: ArrayLike, weights: ArrayLike, groups: ArrayLike) -> float:
    """Mean over groups of each group's exact AUC, weighted by the group's impressions (its sum of weights).

    Groups in which only one class has weight are left out, of the divisor too. One sort by (group, logit), no loop
    over groups.

    Args:
        groups: (n,) integers, for example user ids.
    Source: Zhou et al. 2018, "Deep Interest Network", arXiv 1706.06978, section 5.3 (there with counts as weights).
    """
    z, y, w = _float64(logits, labels, weights)
    if z.size == 0 or not np.isfinite(z).all():
        return np.nan
    group = np.asarray(groups)
    # Sorting twice by one key is slower than once; a constant group is `auc`.
    order = np.argsort(z) if group.min() == group.max() else np.lexsort((z, group))
    z, y, w, group = z[order], y[order], w[order], group[order]
    new_group = np.concatenate(([True], group[1:] != group[:-1]))
    new_score = new_group | np.concatenate(([True], z[1:] != z[:-1]))
    # One entry per distinct (group, logit): its weight of positive and of negative rows.
    ties = np.flatnonzero(new_score)
    positive, negative = np.add.reduceat(w * y, ties), np.add.reduceat(w * (1 - y), ties)
    starts = np.flatnonzero(new_group[ties])
    per_group = np.diff(np.append(starts, ties.size))
    running = np.cumsum(negative)
    before_group = np.repeat(running[starts] - negative[starts], per_group)
    below = running - before_group - negative / 2
    wins = np.add.reduceat(positive * below, starts)
    positives, negatives = np.add.reduceat(positive, starts), np.add.reduceat(negative, starts)
    both = (positives > 0) & (negatives > 0)
    impressions = (positives + negatives)[both]
    if not both.any():
        return np.nan
    return float((impressions * wins[both] / (positives[both] * negatives[both])).sum() / impressions.sum())


def _float64(*arrays: ArrayLike) -> list[Array]:
    return [np.asarray(a, dtype=np.float64) for a in arrays]
