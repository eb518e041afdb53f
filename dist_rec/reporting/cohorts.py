"""What a `cohorts.json` says, for a person: a table and pictures. `metrics.cohorts.to_mapping` has its content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dist_rec.reporting.charts import Histogram, heat_map, histogram_chart
from dist_rec.reporting.svg import COLOURS, DASHES

_SHOWN = 30  # cohorts in the table
_MEASURES = {
    "js": "Jensen-Shannon divergence, nats",
    "kl": "Kullback-Leibler divergence, nats",
    "wasserstein": "Wasserstein-1 distance, log-odds",
    "cosine": "cosine distance",
}


def table(found: Mapping[str, Any]) -> str:
    """The axes that were searched, and the cohorts of the one that was chosen, as aligned text."""
    measure = found["divergence"]["measure"]
    searched = [
        [" x ".join(s["axes"]), str(s["cohorts"]), str(s["below_minimums"]),
         "-" if s["divergence"] is None else f"{s['divergence']:.5f}", s["head"] or "-", s["tail"] or "-"]
        for s in found["searched"]
    ]  # fmt: skip
    columns = ["axis", "cohorts", "too small", measure, "head", "tail"]
    parts = [_aligned([columns, *searched], {1, 2, 3}), ""]
    marks = {tuple(found[part].items()): f"<- {part}" for part in ("head", "tail")}
    lines = [["cohort", "rows", "share", "positives", "base rate", "mean log-odds", ""]]
    cohorts = found["cohorts"]
    for c in cohorts:
        mark = marks.get(tuple(c["cells"].items()), "")
        if len(cohorts) <= _SHOWN or mark:
            lines.append([c["name"], f"{c['rows']:,}", f"{c['mass']:.2%}", f"{c['positives']:,}",
                          f"{c['base_rate']:.5f}", f"{c['mean_log_odds']:.3f}", mark])  # fmt: skip
    parts.append(_aligned(lines, {1, 2, 3, 4, 5}))
    hidden = len(cohorts) - len(lines) + 1
    return "\n".join(parts + ([f"and {hidden} more cohorts"] if hidden else []))


def pictures(found: Mapping[str, Any]) -> list[str]:
    """The distributions of head, tail and all rows; the divergences between all cohorts of the chosen axis."""
    names = {tuple(c["cells"].items()): c["name"] for c in found["cohorts"]}
    histograms = found["histograms"]
    series: list[Histogram] = []
    for part, what in (("head", "head"), ("tail", "tail"), ("all", "all rows")):
        counts = np.asarray(histograms[part], np.float64)
        name = f"{what}: {names[tuple(found[part].items())]}" if part in found else what
        i = len(series)
        series.append(Histogram(name, counts / counts.sum(), COLOURS[i], DASHES[i]))
    edges = np.linspace(histograms["low"], histograms["high"], len(histograms["all"]) + 1)
    axis, divergence = " x ".join(found["axes"]), found["divergence"]
    return [
        histogram_chart("What the model predicts for head and tail", edges, series, "predicted log-odds",
                        "share of the cohort's rows"),
        heat_map(f"How much predictions differ between cohorts of {axis}", [c["name"] for c in found["cohorts"]],
                 divergence["matrix"], _MEASURES[divergence["measure"]]),
    ]  # fmt: skip


def _aligned(lines: list[list[str]], right: set[int]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        .rstrip()
        for line in lines
    )  # fmt: skip
