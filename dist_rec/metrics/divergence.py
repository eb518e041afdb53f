"""How far apart two distributions are, from their histograms over the same bins.

A histogram is an (n,) array of counts, or of any weights >= 0 that are not all 0; each is divided by its sum first.
Estimated from few rows, two equal distributions look different: the Jensen-Shannon divergence of samples is too high by
about (bins in use - 1) / 8 * (1 / rows of the one + 1 / rows of the other). Letters: n bins, c histograms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

SMOOTHING = 0.5
"""Added to each bin for `kl_divergence`, in units of the histogram (the Jeffreys prior, for counts)."""


def js_divergence(p: ArrayLike, q: ArrayLike) -> float:
    """Jensen-Shannon divergence in nats: symmetric, 0 for equal distributions, ln 2 for disjoint ones.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy".
    """
    a, b = _share(p), _share(q)
    middle = (a + b) / 2
    return max(0.0, (_relative_entropy(a, middle) + _relative_entropy(b, middle)) / 2)


def kl_divergence(p: ArrayLike, q: ArrayLike) -> float:
    """Kullback-Leibler divergence of q from p, sum p ln(p / q), in nats; not symmetric.

    `SMOOTHING` is added to every bin of both, as a bin that is empty in q alone would make it infinite.
    """
    a, b = (_share(np.asarray(h, np.float64) + SMOOTHING) for h in (p, q))
    return max(0.0, _relative_entropy(a, b))


def wasserstein_distance(p: ArrayLike, q: ArrayLike, width: float = 1.0) -> float:
    """Wasserstein-1 (earth mover's) distance: how far p's mass must travel to become q; bins are `width` apart."""
    return float(width * np.abs(np.cumsum(_share(p) - _share(q))).sum())


def cosine_distance(p: ArrayLike, q: ArrayLike) -> float:
    """1 - the cosine between the two histograms: 0 for equal distributions, 1 for disjoint ones."""
    a, b = _share(p), _share(q)
    return max(0.0, float(1 - a @ b / np.sqrt((a @ a) * (b @ b))))


MEASURES: dict[str, Callable[[ArrayLike, ArrayLike, float], float]] = {
    "js": lambda p, q, _: js_divergence(p, q),
    "kl": lambda p, q, _: kl_divergence(p, q),
    "wasserstein": wasserstein_distance,
    "cosine": lambda p, q, _: cosine_distance(p, q),
}
"""Name of a measure -> (p, q, width of a bin) -> how far q is from p."""


def divergence_matrix(histograms: Sequence[ArrayLike], measure: str, width: float = 1.0) -> Array:
    """(c, c): `measure` between each histogram (row) and each other one (column); 0 on the diagonal."""
    distance, count = MEASURES[measure], len(histograms)
    result = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            if i != j:
                result[i, j] = distance(histograms[i], histograms[j], width)
    return result


def _share(histogram: ArrayLike) -> Array:
    values = np.asarray(histogram, np.float64)
    return values / values.sum()


def _relative_entropy(p: Array, q: Array) -> float:
    some = p > 0
    return float((p[some] * np.log(p[some] / q[some])).sum())
