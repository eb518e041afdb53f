"""How parameters are distributed while they are trained: `report.weights` names them, `weights.jsonl` gets the record.

Only parameters that every rank holds (everything but tables). A record costs one look at the parameter and, for
matrices, their singular values, on rank 0 while the others wait: seconds for matrices of thousands of rows.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dist_rec.settings import Complaint, ConfigError

_HALF = 64  # bins of a histogram on either side of 0, at most


@dataclass
class WeightsConfig:
    """What `report.weights` takes."""

    parameters: list[str] = field(default_factory=list)  # by name, * stands for anything: "dense.arch.top.*"
    every: int = 1000  # steps between two records; one is also made before the first step and after the last
    near_zero: float = 0.001  # the share of values below this in magnitude is recorded

    def check(self) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `report.weights`."""
        if self.every < 1:
            yield Complaint("every", f"is {self.every}; use a number of steps >= 1")
        if not self.near_zero > 0:
            yield Complaint("near_zero", f"is {self.near_zero}; no value is smaller in magnitude: use a number > 0")


class WeightRecorder:
    """Measures the named parameters of a model when it is time.

    Raises:
        ConfigError: a pattern matches no parameter that every rank holds; the message lists those that exist.
    """

    def __init__(self, model: nn.Module, config: WeightsConfig) -> None:
        # a parameter under embedding_bags is a table, or this rank's part of one
        held = {name: p for name, p in model.named_parameters() if ".embedding_bags." not in name}
        self._config = config
        self._parameters: dict[str, Tensor] = {}
        self._measured: int | None = None
        complaints = []
        for pattern in config.parameters:
            names = fnmatch.filter(held, pattern)
            self._parameters |= {name: held[name] for name in names}
            if not names:
                text = f"has '{pattern}', which matches no parameter outside tables; there are {', '.join(held)}"
                complaints.append(Complaint("report.weights.parameters", text))
        if complaints:
            raise ConfigError(complaints)

    def due(self, step: int, last: bool) -> bool:
        """Whether the parameters after `step` steps are to be measured, which they are once; last: no step follows."""
        return bool(self._parameters) and step != self._measured and (last or step % self._config.every == 0)

    def measure(self, step: int) -> list[dict[str, Any]]:
        """One mapping for each parameter; see `describe`."""
        self._measured = step
        return [{"name": n, **describe(p, self._config.near_zero)} for n, p in self._parameters.items()]


@torch.no_grad()
def describe(parameter: Tensor, near_zero: float) -> dict[str, Any]:
    """How the values of a parameter are distributed, computed in float64.

    Returns:
        "shape"; "std"; "kurtosis", the fourth moment over the squared second, 3 for a normal distribution; "near_zero",
        the share of values smaller than that in magnitude; "effective_rank" of a matrix (axes after the first are
        joined), exp of the entropy of its singular values divided by their sum, 1 to min(rows, columns), None for a
        vector; "histogram": "counts" in bins of "width", the first of which begins at "start" * "width". Widths are
        powers of two and every bin begins at a multiple of its width, so two histograms fit each other.

    Source of the effective rank: Roy and Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    values = parameter.detach().double().cpu()
    centred = values - values.mean()
    variance = float(centred.square().mean())
    return {
        "shape": list(values.shape),
        "std": math.sqrt(variance),
        "kurtosis": float(centred.pow(4).mean()) / variance**2 if variance else math.nan,
        "near_zero": float((values.abs() < near_zero).double().mean()),
        "effective_rank": _effective_rank(values.flatten(1)) if values.dim() > 1 else None,
        "histogram": _histogram(values.flatten()),
    }


def _effective_rank(matrix: Tensor) -> float:
    if not matrix.isfinite().all():
        return math.nan
    singular = torch.linalg.svdvals(matrix)
    shares = singular / singular.sum()
    return math.exp(float(torch.special.entr(shares).sum())) if float(singular.sum()) else math.nan


def _histogram(values: Tensor) -> dict[str, Any]:
    highest = float(values.abs().max())
    if not math.isfinite(highest):
        return {"width": 1.0, "start": 0, "counts": []}
    width = 2.0 ** math.ceil(math.log2(highest / _HALF)) if highest else 2.0**-20
    bins = (values / width).floor().long()
    start = int(bins.min())
    return {"width": width, "start": start, "counts": torch.bincount(bins - start).tolist()}
