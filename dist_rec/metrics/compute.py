"""Which metrics a run reports, and their computation from merged rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dist_rec.contract import EvaluationKind
from dist_rec.data.schema import LabelColumn, Schema
from dist_rec.metrics.binary import auc, calibration, grouped_auc, log_loss, normalized_entropy
from dist_rec.metrics.retrieval import INTERVAL, RetrievalMetrics, is_retrieval
from dist_rec.metrics.rows import Rows
from dist_rec.settings import Complaint, gather

_log = logging.getLogger(__name__)

_BINARY = ("ne", "log_loss", "auc", "calibration")
_REAL = ("mse", "calibration")

MAX_VALUES = 1000
"""Distinct values of a group in `by`; more are certainly ids, which nobody would read as columns of a report."""


@dataclass
class MetricsConfig:
    """What `metrics:` takes. Every run reports NE, log loss, AUC and calibration; this adds to them."""

    by: list[str] = field(default_factory=list)  # groups: every metric also for each of a group's values
    grouped_auc: list[str] = field(default_factory=list)  # groups, e.g. a user id: AUC within each, averaged
    window_rows: int = 100_000  # training reports are of about this many newest rows, all ranks together
    retrieval: RetrievalMetrics = field(default_factory=RetrievalMetrics)  # of models that are judged by retrieval
    # Diagnostics, at every evaluation; set for `dist-rec evaluate` alone they cost training nothing.
    # Representations of the model that ought to differ, by name or pattern ("expert_*"): mean |correlation| of every
    # two of them, and their diversity (see `metrics/representations.py`)
    correlation: list[str] = field(default_factory=list)
    # How many of its directions each table and table set uses (see `embeddings/abundance.py`); reads every table once
    information_abundance: bool = False

    @property
    def groups(self) -> list[str]:
        """The groups whose values the metrics need, each once."""
        return list(dict.fromkeys([*self.by, *self.grouped_auc]))

    def rank_window(self, world_size: int) -> int:
        """`window_rows` of one of `world_size` ranks, rounded up."""
        return -(-self.window_rows // world_size)

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `metrics`."""
        known = ", ".join(schema.groups) or "none"
        for key in ("by", "grouped_auc"):
            for name in getattr(self, key):
                if name not in schema.groups:
                    yield Complaint(key, f"names '{name}', which is no group of the schema; known: {known}")
        yield from gather("retrieval", self.retrieval.check(schema))
        if self.window_rows < 1:
            yield Complaint("window_rows", f"is {self.window_rows}; a metric needs at least one row")


def names(schema: Schema, config: MetricsConfig, kind: EvaluationKind = "labels") -> list[str]:
    """The names of the metrics of all rows together, as an evaluation of that kind gives them."""
    if kind == "retrieval":
        return config.retrieval.names()
    result = []
    for label, declared in schema.labels.items():
        prefix = f"{label}/" if len(schema.labels) > 1 else ""
        real = declared.kind == "real"
        kinds = _REAL if real else (*_BINARY, *(f"gauc/{group}" for group in config.grouped_auc))
        result += [f"{prefix}{kind}" for kind in kinds]
    return result


def direction(name: str) -> int:
    """1 if a higher value of a metric is better, -1 if a lower one is, 0 if neither (calibration: 1 is best)."""
    parts = name.split("/")
    if "auc" in parts or "gauc" in parts or is_retrieval(parts[0]):
        return 0 if INTERVAL in parts else 1
    return 0 if "calibration" in parts else -1


def compute(rows: Rows, schema: Schema, config: MetricsConfig) -> dict[str, float]:
    """Every metric of `rows`.

    Keys, for one label: "ne", "log_loss", "auc", "calibration", "gauc/<group>" for each of `config.grouped_auc`, then
    each of these again with "/<group>=<value>" at its end for each of `config.by` ("auc/domain=3"). With several
    labels each key begins with "<label>/". A label of kind real has "mse" and "calibration" of the raw predictions.
    What the rows cannot define is nan (see `binary.py`), and without rows everything is. A group in `config.by` with
    more than MAX_VALUES values is left out with a warning: a report must not end a run.
    """
    result = {}
    parts = [("", np.arange(len(rows.weights)))]
    for name in config.by:
        parts += [(f"/{name}={value}", index) for value, index in _split(name, rows.groups[name])]
    for column, (label, declared) in enumerate(schema.labels.items()):
        prefix = f"{label}/" if len(schema.labels) > 1 else ""
        for suffix, index in parts:
            for metric, value in _of_label(rows, column, declared, index, config).items():
                result[f"{prefix}{metric}{suffix}"] = value
    return result


def _of_label(
    rows: Rows, column: int, declared: LabelColumn, index: NDArray[np.int64], config: MetricsConfig
) -> dict[str, float]:
    z = rows.predictions[index, column].astype(np.float64)
    y = rows.labels[index, column].astype(np.float64)
    w = rows.weights[index].astype(np.float64)
    if declared.kind == "real":
        total, target = w.sum(), (w * y).sum()
        return {
            "mse": float((w * (z - y) ** 2).sum() / total) if total else np.nan,
            "calibration": float((w * z).sum() / target) if target else np.nan,
        }
    result = {
        "ne": normalized_entropy(z, y, w),
        "log_loss": log_loss(z, y, w),
        "auc": auc(z, y, w),
        "calibration": calibration(z, y, w),
    }
    for name in config.grouped_auc:
        result[f"gauc/{name}"] = grouped_auc(z, y, w, rows.groups[name][index])
    return result


def _split(name: str, group: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each value of a group, ascending, with the indices of its rows."""
    if len(group) == 0:
        return
    order = np.argsort(group, kind="stable")
    values, starts = np.unique(group[order], return_index=True)
    if len(values) > MAX_VALUES:
        _log.warning(
            "metrics.by names '%s', which has %d values here, more than the %d that a report can hold: it is left out; "
            "use metrics.grouped_auc for ids",
            name,
            len(values),
            MAX_VALUES,
        )
        return
    for value, index in zip(values, np.split(order, starts[1:]), strict=True):
        yield int(value), index
