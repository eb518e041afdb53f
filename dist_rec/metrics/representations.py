"""How far representations of an arch (the outputs of its experts, say) repeat each other, over rows of an evaluation.

Letters: R columns of all compared representations side by side, M representations, d columns of one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from dist_rec.settings import Complaint, ConfigError

_CONSTANT = 1e-12  # a variance below this share of the mean square is rounding


def chosen(patterns: Sequence[str], widths: Mapping[str, int]) -> dict[str, int]:
    """The representations, name -> columns, that `metrics.correlation` names, in the order of `widths`.

    Raises:
        ConfigError: a pattern that matches none, or fewer than two representations in all.
    """
    known = ", ".join(widths) or "none"
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in widths):
            text = f"has '{pattern}', which matches no representation of the model; it has {known}"
            raise ConfigError([Complaint("metrics.correlation", text)])
    found = {name: w for name, w in widths.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)}
    if len(found) == 1:
        text = f"names {next(iter(found))} alone; two are needed to compare; the model has {known}"
        raise ConfigError([Complaint("metrics.correlation", text)])
    return found


class Moments:
    """Weighted sums, and sums of products, of R columns over the rows of many steps, in float64 on their device.

    Takes 8 * R * (R + 1) bytes and 2 B R^2 operations for B rows. Example::

        moments = Moments()
        for output in outputs:
            moments.add(output.compared, output.weights)
        found = describe(moments.correlation(gloo_group), {"expert_0": 64, "expert_1": 64})
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add(self, columns: Tensor, weights: Tensor) -> None:
        """columns: (B, R). weights: (B,) >= 0, 0 for padding."""
        ones = columns.new_ones((len(columns), 1), dtype=torch.float64)
        x = torch.cat([ones, columns.double()], dim=1)
        # what a padding row holds may be anything, and 0 * inf is nan
        x = torch.where((weights > 0).unsqueeze(1), x, 0)
        products = x.T @ (x * weights.double().unsqueeze(1))
        self._sums = products if self._sums is None else self._sums + products

    def correlation(self, group: dist.ProcessGroup | None = None) -> NDArray[np.float64]:
        """(R, R), over the rows of all ranks, the same on every rank; nan for columns that are constant. Collective.

        Args:
            group: a gloo group; None is the default group. Without an initialised process group: this rank's rows.
        """
        assert self._sums is not None, "every rank has at least one step, of padding if need be"
        sums = self._sums.cpu()
        if dist.is_initialized():
            dist.all_reduce(sums, group=group)
        total, first, second = sums[0, 0], sums[0, 1:], sums[1:, 1:]
        covariance = (second / total - torch.outer(first / total, first / total)).numpy()
        mean_square = (second.diagonal() / total).numpy()
        variance = np.where(covariance.diagonal() > _CONSTANT * mean_square, covariance.diagonal(), np.nan)
        return covariance / np.sqrt(np.outer(variance, variance))


def describe(correlation: NDArray[np.float64], widths: Mapping[str, int]) -> dict[str, float]:
    """From the (R, R) correlation of M representations side by side to what is reported.

    - "correlation/<a>~<b>": mean of |correlation| over all pairs of a column of a and a column of b, which are not
      constant; nan if there are none. "correlation": the mean over all pairs of representations.
    - "diversity_qjsd": 0 if all are the same, 1 if no column of one correlates with one of another; see `diversity`.
    """
    ends = np.cumsum(list(widths.values()))
    place = {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends, strict=True)}
    pairs = {f"correlation/{a}~{b}": _mean(np.abs(correlation[place[a], place[b]])) for a, b in combinations(widths, 2)}
    return {
        "correlation": _mean(np.array(list(pairs.values()))),
        "diversity_qjsd": diversity(correlation, list(place.values())),
        **pairs,
    }


def diversity(correlation: NDArray[np.float64], parts: Sequence[slice]) -> float:
    """Our own index of how different M representations are: their quantum Jensen-Shannon divergence, scaled to 0..1.

    With S(A) the entropy of the eigenvalues of A over their sum, w_m the share of representation m in all columns and
    C_m its block of the correlation C: ``(S(C) - sum_m w_m S(C_m)) / (-sum_m w_m ln w_m)``. It is 1 where no column
    of one correlates with one of another, 0 where all are the same but for shift, scale and order of their columns, and
    neither of these changes it. It is not the Diversity Index of the Crocodile paper (arXiv 2405.12706), whose formula
    is not public. Constant columns are left out; nan with fewer than two representations that have another one.

    Divergence: Majtey, Lamberti, Prato 2005, arXiv quant-ph/0508138.
    """
    alive = ~np.isnan(correlation.diagonal())
    blocks = [correlation[part, part][np.ix_(alive[part], alive[part])] for part in parts if alive[part].any()]
    if len(blocks) < 2:
        return np.nan
    shares = np.array([len(block) for block in blocks]) / alive.sum()
    inner = sum(share * _entropy(block) for share, block in zip(shares, blocks, strict=True))
    return float((_entropy(correlation[np.ix_(alive, alive)]) - inner) / -(shares * np.log(shares)).sum())


def _entropy(matrix: NDArray[np.float64]) -> float:
    values = np.linalg.eigvalsh(matrix).clip(min=0) / len(matrix)
    values = values[values > 0]
    return float(-(values * np.log(values)).sum())


def _mean(values: NDArray[np.float64]) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else np.nan
