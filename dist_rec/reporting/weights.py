"""The section of a report about weights: how recorded parameters were distributed, over training and at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dist_rec.reporting.charts import Histogram, Line, histogram_chart, line_chart
from dist_rec.reporting.folders import RunFolder
from dist_rec.reporting.page import Section, heading, quiet, row
from dist_rec.reporting.svg import COLOURS, GREY, dash

_MOST_PARAMETERS = 24  # drawn; a page of more is not read
_SNAPSHOTS = ("#9ecae1", "#4292c6", "#08519c", "#000000")  # from early to late, told apart by lightness alone
_FEWEST_BINS = 10

_Recorded = list[tuple[int, dict[str, Any]]]
"""(examples, what was recorded of one parameter), in the order of training."""


def weights(folders: Sequence[RunFolder]) -> Section:
    """What `weights.jsonl` of each run holds."""
    names = list(dict.fromkeys(p["name"] for f in folders for r in f.weights for p in r["parameters"]))
    if not names:
        words = "No run recorded any: set report.weights.parameters (patterns of parameter names) and train."
        return Section("weights", "Weights", [quiet(words)])
    parts = [quiet(
        "Parameters, not activations. Kurtosis is 3 for a normal distribution; effective rank is exp of the entropy of "
        "the singular values' shares (Roy and Vetterli 2007)."
    )]  # fmt: skip
    for name in names[:_MOST_PARAMETERS]:
        series = [_recorded(folder, name) for folder in folders]
        shape = next(p["shape"] for one in series for _, p in one)
        parts.append(heading(f"{name}, {' x '.join(map(str, shape))}"))
        # a row each, so that the pictures of the runs stand beside each other
        parts += [row(_at_the_end(folders, series)), row(_over_training(folders, series))]
        parts.append(row(_curves(folders, series)))
    if len(names) > _MOST_PARAMETERS:
        parts.append(quiet(f"Not drawn: {', '.join(names[_MOST_PARAMETERS:])}; name fewer in report.weights."))
    return Section("weights", "Weights", parts)


def on_one_grid(histograms: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Histograms of `training.weights` over the same bins: ((n + 1,) edges, (n,) shares of each).

    Bins are the widest of all, or wider where a histogram has few values: about as many as the root of their number.
    """
    width = max(h["width"] for h in histograms)
    most = max(_FEWEST_BINS, min(sum(h["counts"]) for h in histograms) ** 0.5)
    reach = max(h["width"] * (len(h["counts"])) for h in histograms)
    while reach / width > most:
        width *= 2
    places = [np.floor((h["start"] + np.arange(len(h["counts"]))) * (h["width"] / width)) for h in histograms]
    low, high = int(min(p[0] for p in places)), int(max(p[-1] for p in places))
    shares = []
    for h, place in zip(histograms, places, strict=True):
        counts = np.bincount(place.astype(int) - low, h["counts"], minlength=high - low + 1)
        shares.append(counts / counts.sum())
    return (low + np.arange(high - low + 2)) * width, shares


def _recorded(folder: RunFolder, name: str) -> _Recorded:
    return [(record["examples"], p) for record in folder.weights for p in record["parameters"] if p["name"] == name]


def _at_the_end(folders: Sequence[RunFolder], series: Sequence[_Recorded]) -> Iterator[str]:
    """The newest record of every run, and the oldest of the first run that has one."""
    shown: list[tuple[str, str, str, dict[str, Any]]] = []
    for i, (folder, records) in enumerate(zip(folders, series, strict=True)):
        if records:
            examples, p = records[-1]
            shown.append((f"{folder.name}, {examples:,} examples", COLOURS[i % len(COLOURS)], dash(i), p["histogram"]))
    examples, p = next(records[0] for records in series if records)
    shown.append((f"at {examples:,} examples", GREY, "2 2", p["histogram"]))
    shown = [one for one in shown if one[3]["counts"]]  # none where a value was not finite
    if shown:
        edges, heights = on_one_grid([one[3] for one in shown])
        lines = [Histogram(one[0], values, one[1], one[2]) for one, values in zip(shown, heights, strict=True)]
        yield histogram_chart("At the end", edges, lines, "weight", "share of the weights")


def _over_training(folders: Sequence[RunFolder], series: Sequence[_Recorded]) -> Iterator[str]:
    """For each run up to four of its records, evenly spread."""
    for folder, records in zip(folders, series, strict=True):
        whole = [(examples, p["histogram"]) for examples, p in records if p["histogram"]["counts"]]
        count = min(len(whole), len(_SNAPSHOTS))
        if count < 2:
            continue
        chosen = [whole[round(k * (len(whole) - 1) / (count - 1))] for k in range(count)]
        edges, heights = on_one_grid([histogram for _, histogram in chosen])
        lines = [
            Histogram(f"{examples:,}", values, colour)
            for (examples, _), values, colour in zip(chosen, heights, _SNAPSHOTS[-count:], strict=True)
        ]
        yield histogram_chart(folder.name, edges, lines, "weight", "", "by training examples", small=True)


def _curves(folders: Sequence[RunFolder], series: Sequence[_Recorded]) -> Iterator[str]:
    near = {folder.config["report"]["weights"]["near_zero"] for folder in folders if folder.weights}
    share = f"share |w| < {near.pop():g}" if len(near) == 1 else "share of |w| near 0"
    words = {
        "std": "standard deviation",
        "kurtosis": "kurtosis",
        "near_zero": share,
        "effective_rank": "effective rank",
    }
    for key, title in words.items():
        lines = []
        for folder, records in zip(folders, series, strict=True):
            points = [(float(examples), float(p[key])) for examples, p in records if p[key] is not None]
            lines.append(Line(folder.name, [x for x, _ in points], [y for _, y in points]))
        if any(line.x for line in lines):
            yield line_chart(title[0].upper() + title[1:], lines, "training examples", "", small=True)
