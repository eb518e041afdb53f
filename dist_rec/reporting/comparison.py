"""Runs compared on one split: the numbers of a report, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_rec.metrics.compare import CohortMetrics, Difference, Mask, cohort_metrics, ne_differences


@dataclass(frozen=True)
class CohortSize:
    """How many rows a cohort has, how many of them are positive, and which part of the page it belongs to."""

    part: str
    rows: int
    positives: int
    base_rate: float


@dataclass(frozen=True)
class Comparison:
    """Runs on the same rows; the first is the baseline.

    Attributes:
        split, data, label, unit: what was evaluated, and what is resampled together (None: rows).
        runs: their names. cohorts: name -> its size; the first is all rows.
        metrics: of each run, by cohort. differences: cohort -> of each run but the first.
    """

    split: str
    data: str
    label: str
    unit: str | None
    replicates: int
    runs: list[str]
    cohorts: dict[str, CohortSize]
    metrics: list[dict[str, CohortMetrics]]
    differences: dict[str, list[Difference]]

    def to_mapping(self) -> dict[str, Any]:
        """All of it as plain values, for other programs."""
        values = asdict(self)
        values["metrics"] = [{name: m._asdict() for name, m in run.items()} for run in self.metrics]
        values["differences"] = {name: [d._asdict() for d in ds] for name, ds in self.differences.items()}
        return values


@dataclass(frozen=True)
class Divided:
    """Cohorts of one part of the page: its title, and name -> (n,) which rows are in."""

    part: str
    masks: Mapping[str, Mask]


def compare(
    runs: Mapping[str, NDArray[np.float32]],
    labels: NDArray[np.float32],
    weights: NDArray[np.float32],
    divided: Sequence[Divided],
    units: NDArray[np.int64] | None,
    **facts: Any,
) -> Comparison:
    """runs: name -> (n,) logits, the baseline first. labels, weights, units: (n,). facts: the rest of a `Comparison`.

    A cohort without rows is left out.
    """
    everything = Divided("", {"all rows": np.full(len(labels), True)})
    named = {name: (d.part, mask) for d in (everything, *divided) for name, mask in d.masks.items() if mask.any()}
    masks = {name: mask for name, (_, mask) in named.items()}
    sizes, w = {}, weights.astype(np.float64)
    for name, (part, mask) in named.items():
        rows, rate = int(mask.sum()), float((labels * w)[mask].sum() / w[mask].sum())
        sizes[name] = CohortSize(part, rows, int(labels[mask].sum()), rate)
    return Comparison(
        runs=list(runs),
        cohorts=sizes,
        metrics=[cohort_metrics(logits, labels, weights, masks) for logits in runs.values()],
        differences=ne_differences(
            list(runs.values()),
            labels,
            weights,
            masks,
            units=units,
            replicates=facts["replicates"],
            seed=facts.pop("seed"),
        ),
        **facts,
    )
