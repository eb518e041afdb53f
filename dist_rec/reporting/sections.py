"""The sections of a report about what runs predict: what each is, its curves, its metrics, those of cohorts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np

from dist_rec.metrics.compare import FEWEST_UNITS, LEVEL, Difference
from dist_rec.reporting import cohorts as cohort_pictures
from dist_rec.reporting.charts import Line, Row, line_chart, row_chart
from dist_rec.reporting.comparison import Comparison
from dist_rec.reporting.folders import RunFolder
from dist_rec.reporting.page import Cell, Section, heading, paragraph, quiet, row, table

_MEASURES = {"ne": "normalised entropy", "auc": "AUC", "log_loss": "log loss", "calibration": "calibration"}


def overview(folders: Sequence[RunFolder], compared: Comparison) -> Section:
    """What each run is and how it went."""
    rows = []
    for i, folder in enumerate(folders):
        config, result = folder.config, folder.result
        wall = timedelta(seconds=round(result["wall_seconds"])) if result else "–"
        extras = ", ".join(config.get("auxiliary") or {}) or "none"
        rows.append([
            folder.name + (" (baseline)" if i == 0 else ""), config["model"]["name"], config["objective"]["name"],
            extras, f"{folder.step:,}", _count(result.get("examples")), _count(result.get("examples_per_second")),
            str(wall), str(result.get("world_size", "–")), str(config["run"]["seed"]), folder.path,
        ])  # fmt: skip
    columns = ["run", "model", "objective", "auxiliaries", "step evaluated", "examples", "examples/s", "time", "ranks",
               "seed", "folder"]  # fmt: skip
    said = f"Evaluated on the {compared.split} split, {compared.data}, label '{compared.label}': "
    size = compared.cohorts["all rows"]
    said += f"{size.rows:,} rows of weight > 0, {size.positives:,} of them positive, base rate {size.base_rate:.5f}."
    return Section("runs", "Runs", [table(columns, rows), paragraph(said)])


def curves(folders: Sequence[RunFolder], label: str) -> Section:
    """What was reported while the runs trained, over examples."""
    parts: list[str] = []
    for split in ("train", "validation"):
        for measure in ("ne", "auc"):
            lines = [Line(f.name, *_curve(f, split, measure, label)) for f in folders]
            if any(len(line.x) > 0 for line in lines):
                title = f"{_MEASURES[measure]} of {'the newest training rows' if split == 'train' else split}"
                parts.append(line_chart(title[0].upper() + title[1:], lines, "training examples", _MEASURES[measure]))
    terms = dict.fromkeys(k for f in folders for r in f.reports for k in r["metrics"] if k.startswith("loss/"))
    for term in terms:
        lines = [Line(f.name, *_curve(f, "train", term, "")) for f in folders]
        parts.append(
            line_chart(f"Loss term {term.removeprefix('loss/')}, weighted", lines, "training examples", "loss")
        )
    if not parts:
        parts.append(quiet("None of the runs has a metrics.jsonl."))
    return Section("curves", "Training curves", [row(parts)])


def final_metrics(compared: Comparison) -> Section:
    """All rows together, and the difference to the baseline."""
    rows = [_metric_cells(compared, i, "all rows", name) for i, name in enumerate(compared.runs)]
    columns = ["run", "NE", "log loss", "AUC", "calibration", "NE difference", f"{LEVEL:.0%} interval"]
    return Section("metrics", "Final metrics", [table(columns, rows), quiet(_how(compared))])


def cohort_metrics(compared: Comparison, found_in: str | None) -> Section:
    """The same for every cohort, as tables and as charts."""
    parts = [paragraph(f"Head and tail are those of {found_in}.")] if found_in else []
    if len(compared.cohorts) == 1:
        parts.append(quiet("No cohorts: give cohorts=FILE, which dist-rec cohorts writes, or axes=GROUP,..."))
        return Section("cohorts", "Cohorts", parts)
    for title, names in _parts(compared).items():
        parts += [heading(title), _cohort_table(compared, names), row(_cohort_charts(compared, title, names))]
    parts.append(quiet(
        "NE, own rate, divides the log loss by the entropy of the cohort's base rate, NE, global rate, by that of "
        "all rows' base rate; the difference between two runs is the same by either. " + _how(compared)
    ))  # fmt: skip
    return Section("cohorts", "Cohorts", parts)


def divergence(found: Mapping[str, Any] | None, source: str | None) -> Section:
    """How predictions of the run in which the cohorts were found differ between them."""
    if found is None:
        words = "No cohorts.json was given: dist-rec cohorts RUN DATA writes it, with the divergence of all cohorts."
        return Section("divergence", "Cohort divergence", [quiet(words)])
    if not {"divergence", "histograms", "cohorts", "searched"} <= found.keys():
        return Section("divergence", "Cohort divergence", [quiet(f"{source} has no divergences, only cohorts.")])
    run, data = found.get("run", {}), found.get("data", {})
    words = (
        f"From {source}: run {run.get('dir')} at step {run.get('step')}, {found['rows']:,} rows of {data.get('path')}."
    )
    return Section("divergence", "Cohort divergence", [paragraph(words), row(cohort_pictures.pictures(found))])


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _curve(folder: RunFolder, split: str, measure: str, label: str) -> tuple[list[float], list[float]]:
    """x and y of a metric; with several labels its name begins with the label."""
    x, y = [], []
    for report in folder.reports:
        metrics = report["metrics"]
        value = metrics.get(measure, metrics.get(f"{label}/{measure}"))
        if report["split"] == split and value is not None:
            x.append(float(report["examples"]))
            y.append(float(value))
    return x, y


def _how(compared: Comparison) -> str:
    unit, base = f"values of {compared.unit}" if compared.unit else "rows", compared.runs[0]
    return (
        f"NE difference: (NE - NE of {base}) / NE of {base}; negative is better, bold where the interval leaves out 0. "
        f"Intervals: paired bootstrap over {unit}, {compared.replicates:,} replicates, "
        f"percentiles; none where fewer than {FEWEST_UNITS} {unit} carry the loss (effective number). They say nothing "
        "of how another seed would train."
    )


def _metric_cells(compared: Comparison, run: int, cohort: str, first: str, both: bool = False) -> list[str | Cell]:
    m = compared.metrics[run][cohort]
    values = [m.ne, m.ne_global, m.auc, m.calibration] if both else [m.ne, m.log_loss, m.auc, m.calibration]
    cells: list[str | Cell] = [first, *("–" if np.isnan(v) else f"{v:.5f}" for v in values)]
    if run == 0:
        return [*cells, "baseline", ""]
    d = compared.differences[cohort][run - 1]
    if np.isnan(d.value):
        return [*cells, "–", "–"]
    clear = d.low > 0 or d.high < 0
    return [*cells, Cell(f"{d.value:+.3%}", clear), Cell(interval_in_words(d), clear)]


def interval_in_words(d: Difference) -> str:
    """Of a difference, in percent; a dash where there is none."""
    return "–" if np.isnan(d.low) else f"{d.low:+.3%} to {d.high:+.3%}"


def _parts(compared: Comparison) -> dict[str, list[str]]:
    """Title of a part -> its cohorts, without all rows."""
    result: dict[str, list[str]] = {}
    for name, size in compared.cohorts.items():
        if size.part:
            result.setdefault(size.part, []).append(name)
    return result


def _cohort_table(compared: Comparison, names: Sequence[str]) -> str:
    columns = ["cohort", "rows", "positives", "base rate", "run", "NE, own rate", "NE, global rate", "AUC",
               "calibration", "NE difference", f"{LEVEL:.0%} interval"]  # fmt: skip
    rows: list[list[str | Cell]] = []
    for name in names:
        size = compared.cohorts[name]
        for i, run in enumerate(compared.runs):
            facts = [name, f"{size.rows:,}", f"{size.positives:,}", f"{size.base_rate:.5f}"] if i == 0 else [""] * 4
            rows.append([*facts, *_metric_cells(compared, i, name, run, both=True)])
    return table(columns, rows, starts=range(0, len(rows), len(compared.runs)))


def _cohort_charts(compared: Comparison, title: str, names: Sequence[str]) -> Iterator[str]:
    cohorts = ["all rows", *names]
    if len(compared.runs) > 1:
        rows = []
        for name in cohorts:
            found = compared.differences[name]
            rows.append(Row(name, [100 * d.value for d in found], [_percent(d) for d in found]))
        subtitle = f"below 0: better than {compared.runs[0]}; lines: {LEVEL:.0%} intervals"
        yield row_chart(f"NE difference by {title}", rows, compared.runs[1:], f"NE difference to {compared.runs[0]}, %",
                        kind="bars", subtitle=subtitle, first_colour=1)  # fmt: skip
    for field, words in (("ne", "NE by the cohort's own base rate"), ("auc", "AUC")):
        rows = [Row(name, [getattr(run[name], field) for run in compared.metrics]) for name in cohorts]
        yield row_chart(f"{words}, by {title}", rows, compared.runs, words, kind="dots")
    rows = [Row(name, [100 * (run[name].calibration - 1) for run in compared.metrics]) for name in cohorts]
    yield row_chart(f"Calibration by {title}", rows, compared.runs, "sum of predictions / sum of labels - 1, %",
                    kind="bars", subtitle="above 0: the run predicts too much")  # fmt: skip


def _percent(d: Difference) -> tuple[float, float] | None:
    return None if np.isnan(d.low) else (100 * d.low, 100 * d.high)
