"""Compares trained runs on one page: `dist-rec report RUN_A RUN_B ...`."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dist_rec.config import RunConfig, from_mapping, read, split_options, to_mapping
from dist_rec.data import cohorts as cohorts_file
from dist_rec.data.cohorts import Axis, Cohorts
from dist_rec.data.footers import DataError
from dist_rec.job import DataSetError, check_output, restore, run_entry
from dist_rec.metrics.axes import AxisError, Cut, CutAxis, Ranks, check_cuts, cut_axes, parse_cut
from dist_rec.metrics.compare import Mask
from dist_rec.metrics.rows import Rows
from dist_rec.reporting import sections
from dist_rec.reporting.comparison import Comparison, Divided, compare
from dist_rec.reporting.folders import RunFolder, read_folder, short_names
from dist_rec.reporting.page import page
from dist_rec.reporting.weights import weights
from dist_rec.settings import Complaint, ConfigError, gather, parse
from dist_rec.training.checkpoint import CheckpointError
from dist_rec.training.evaluation import collect
from dist_rec.training.report import to_json
from dist_rec.training.runtime import Runtime, process

USAGE = """usage: dist-rec report RUN [RUN ...] [key=value ...]

Evaluates each run on the same rows and writes one self-contained HTML page: training curves, final metrics, metrics and
differences of cohorts with paired bootstrap intervals, how cohorts differ, how weights were distributed while training.
Rows are paired by their place in the files; rank 0 keeps them, 12 bytes per row and run.

RUN                      a run folder: its config.yaml and its checkpoints (the best one of an early-stopping run, else
                         the newest)

baseline=RUN             the run that the others are compared with (default: the first)
split=test               train, validation or test (default: test), by the baseline's config
data=PATH                evaluate other files instead
cohorts=FILE             what dist-rec cohorts wrote (default: cohorts.json in the baseline's folder, if it is there)
axes=domain,age:10       groups of the schema along which metrics are divided too; see dist-rec cohorts --help
max_values=100           an axis that is taken by value has at most this many
unit=user                a group whose rows are resampled together: rows of one user are not independent; one in
                         which the unknown do not share a value (default: rows)
replicates=1000 seed=0   of the bootstrap
label=click              which label (default: the baseline's first binary one)
output=report.html       the numbers are written beside it, as report.json
run.device=cpu           keys with a dot override the config of every run

On several ranks:  torchrun --nproc-per-node 2 -m dist_rec.report RUN [RUN ...] [key=value ...]
"""


@dataclass
class ReportOptions:
    """What follows the runs on the command line."""

    baseline: str | None = None
    split: Literal["train", "validation", "test"] = "test"
    data: str | None = None
    cohorts: str | None = None
    axes: str | list[str] | None = None
    max_values: int = 100
    unit: str | None = None
    replicates: int = 1000
    seed: int = 0
    label: str | None = None
    output: str = "report.html"

    def check(self, runs: Sequence[str]) -> Iterator[Complaint]:
        """Complaints about the options alone."""
        if self.baseline is not None and _resolved(self.baseline) not in map(_resolved, runs):
            yield Complaint("baseline", f"is '{self.baseline}', which is none of the runs {', '.join(runs)}")
        if self.max_values < 1:
            yield Complaint("max_values", f"is {self.max_values}; use at least 1")
        if self.replicates < 1:
            yield Complaint("replicates", f"is {self.replicates}; an interval needs hundreds")
        if self.seed < 0:
            yield Complaint("seed", f"is {self.seed}; use a number >= 0")
        yield from check_output(self.output, ".html")

    def cuts(self) -> list[Cut | str]:
        """The axes, or what is wrong with one."""
        names = self.axes.split(",") if isinstance(self.axes, str) else self.axes or []
        return [parse_cut(name.strip()) for name in names]


def _resolved(path: str) -> Path:
    return Path(path).resolve()


@dataclass
class Plan:
    """What is to be reported; the first of the runs is the baseline."""

    paths: list[str]
    configs: list[RunConfig]
    options: ReportOptions
    label: str
    cohorts: Cohorts | None
    cohorts_path: str | None

    @property
    def groups(self) -> list[str]:
        """The groups of the baseline's schema that are needed."""
        names = [cut.name for cut in self.options.cuts() if isinstance(cut, Cut)]
        names += self.cohorts.axes if self.cohorts is not None else []
        names += [self.options.unit] if self.options.unit is not None else []
        return list(dict.fromkeys(names))

    def check(self) -> Iterator[Complaint]:
        """Complaints about options that do not go with the runs."""
        schema, unit = self.configs[0].schema, self.options.unit
        yield from check_cuts(self.options.cuts(), schema.groups)
        if self.cohorts is not None:
            yield from gather(str(self.cohorts_path), self.cohorts.check_schema(schema))
        if unit is not None and unit not in schema.groups:
            known = ", ".join(schema.groups) or "none"
            yield Complaint("unit", f"is '{unit}', which is no group of the schema; known: {known}")
        for path, config in zip(self.paths, self.configs, strict=True):
            binary = [name for name, column in config.schema.labels.items() if column.kind == "binary"]
            if self.label not in binary:
                text = f"is '{self.label}', which is no binary label of {path}; known: {', '.join(binary) or 'none'}"
                yield Complaint("label", text)


def load(runs: Sequence[str], arguments: Sequence[str]) -> Plan:
    """The configs of the runs and the options; ConfigError with all that is wrong with them."""
    complaints = list(_check_runs(runs))
    given, overrides = split_options(arguments)
    options: ReportOptions = parse(ReportOptions, given, complaints)
    complaints += options.check(runs) if not complaints else []
    if complaints:
        raise ConfigError(complaints)
    first = _resolved(options.baseline or runs[0])
    paths = sorted(runs, key=lambda run: _resolved(run) != first)  # stable: the others keep their order
    configs = [_config(path, options, overrides) for path in paths]
    beside = Path(paths[0]) / "cohorts.json"
    source = options.cohorts or (str(beside) if beside.is_file() else None)
    cohorts = cohorts_file.read(source) if source is not None else None
    labels = configs[0].schema.labels
    label = options.label or next((name for name, column in labels.items() if column.kind == "binary"), "")
    plan = Plan(paths, configs, options, label, cohorts, source)
    complaints += plan.check()
    if complaints:
        raise ConfigError(complaints)
    return plan


def _check_runs(runs: Sequence[str]) -> Iterator[Complaint]:
    if not runs:
        yield Complaint("RUN", "is missing: dist-rec report RUN [RUN ...] [key=value ...]")
    seen = [_resolved(run) for run in runs]
    for i, run in enumerate(runs):
        if not (seen[i] / "config.yaml").is_file():
            yield Complaint(run, "has no config.yaml; give the run.dir of a trained run")
        elif seen[i] in seen[:i]:
            yield Complaint(run, "is there twice; name each run once")


def _config(path: str, options: ReportOptions, overrides: Sequence[str]) -> RunConfig:
    values = read(str(Path(path) / "config.yaml"), overrides)
    values["run"]["dir"], values["evaluate"]["split"] = path, options.split
    if options.data is not None:
        values["data"] |= {options.split: options.data, "synthetic": None}  # a missing file is not made up
    return from_mapping(values)


def run(plan: Plan) -> Comparison | None:
    """Evaluates, compares and writes, in this process, one rank of the job; the numbers, on rank 0."""
    with process(plan.configs[0].run) as runtime:
        return _Report(plan, runtime).run()


class _Report:
    """One report: the runs one after the other, then rank 0 alone."""

    def __init__(self, plan: Plan, runtime: Runtime) -> None:
        self.plan, self.runtime = plan, runtime
        self.names = short_names(plan.paths)
        self.fingerprint: dict[str, Any] = {}
        self.data = ""
        self.steps: list[int] = []

    def run(self) -> Comparison | None:
        rows = [self._evaluate(i) for i in range(len(self.plan.paths))]
        kept = [one for one in rows if one is not None]
        if not kept:
            return None
        for i, one in enumerate(kept):
            self._check_same_rows(i, one, kept[0])
        result = self._compare(kept)
        self._write(result)
        return result

    def _evaluate(self, i: int) -> Rows | None:
        """A run's rows of the one label, in the order of the files; on rank 0."""
        config, options = self.plan.configs[i], self.plan.options
        trained = restore(config, self.runtime)
        found = trained.data.fingerprint(options.split)
        if i == 0:
            self.fingerprint, self.data = found, str(getattr(config.data, options.split))
        elif found != self.fingerprint:
            raise DataSetError(
                f"data.{options.split} of {self.plan.paths[i]} is not that of {self.plan.paths[0]} ({self.data}): rows "
                "cannot be compared; give the files for all runs with data=PATH"
            )
        labels = list(config.schema.labels)
        groups = self.plan.groups if i == 0 else []
        rows = collect(trained.model, trained.data.once(options.split), len(labels), groups, self.runtime)
        self.steps.append(trained.checkpoint.step)
        del trained
        gc.collect()  # a model is full of circles, and the next one needs its memory
        if rows is None:
            return None
        at = [labels.index(self.plan.label)]
        return Rows(rows.predictions[:, at].copy(), rows.labels[:, at].copy(), rows.weights.copy(), rows.groups)

    def _check_same_rows(self, i: int, rows: Rows, first: Rows) -> None:
        path = self.plan.paths[i]
        if not np.isfinite(rows.predictions).all():
            raise CheckpointError(f"{path} predicts NaN or infinity for some rows; leave it out, or train it anew")
        if not (np.array_equal(rows.labels, first.labels) and np.array_equal(rows.weights, first.weights)):
            text = f"'{self.plan.label}' or the weights of the rows differ between {path} and {self.plan.paths[0]}"
            raise DataError(
                f"{text}: their schemas read the files differently; make schema.labels and schema.weight equal"
            )

    def _compare(self, rows: Sequence[Rows]) -> Comparison:
        options, first = self.plan.options, rows[0]
        return compare(
            {name: one.predictions[:, 0] for name, one in zip(self.names, rows, strict=True)},
            first.labels[:, 0],
            first.weights,
            [*self._cohorts(first), *self._axes(first)],
            first.groups[options.unit] if options.unit is not None else None,
            split=options.split,
            data=self.data,
            label=self.plan.label,
            unit=options.unit,
            replicates=options.replicates,
            seed=options.seed,
        )

    def _cohorts(self, rows: Rows) -> Iterator[Divided]:
        found = self.plan.cohorts
        if found is None:
            return
        masks = found.masks({name: torch.from_numpy(rows.groups[name]) for name in found.axes})
        head, tail = masks.head.numpy(), masks.tail.numpy()
        yield Divided("head and tail", {
            f"head: {_in_words(found, found.head)}": head,
            f"tail: {_in_words(found, found.tail)}": tail,
            "neither": ~(head | tail),
        })  # fmt: skip

    def _axes(self, rows: Rows) -> Iterator[Divided]:
        cuts = [cut for cut in self.plan.options.cuts() if isinstance(cut, Cut)]
        alone = Ranks(every=lambda value: [value], total=lambda counts: counts)
        groups: dict[str, NDArray[np.int64]] = rows.groups
        axes = cut_axes(cuts, lambda: [groups], alone, self.plan.options.max_values)
        problems = [Complaint("axes", str(axis)) for axis in axes if isinstance(axis, AxisError)]
        if problems:
            raise ConfigError(problems)
        for axis in axes:
            assert isinstance(axis, CutAxis)
            number = axis.numbers(torch.from_numpy(groups[axis.axis.name])).numpy()
            masks: dict[str, Mask] = {axis.describe(cell): number == i for i, cell in enumerate(axis.cells)}
            yield Divided(axis.axis.name, masks)

    def _write(self, result: Comparison) -> None:
        plan, output = self.plan, Path(self.plan.options.output)
        folders = [
            read_folder(name, path, to_mapping(config), step)
            for name, path, config, step in zip(self.names, plan.paths, plan.configs, self.steps, strict=True)
        ]
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(self._page(folders, result), encoding="utf-8")
        numbers = output.with_suffix(".json")
        numbers.write_text(to_json(result.to_mapping(), indent=1) + "\n")
        for i, name in enumerate(result.runs):
            m = result.metrics[i]["all rows"]
            line = f"{name}: NE {m.ne:.5f}  AUC {m.auc:.5f}  calibration {m.calibration:.5f}"
            if i > 0:
                d = result.differences["all rows"][i - 1]
                line += f"  NE difference {d.value:+.3%} ({sections.interval_in_words(d)})"
            print(line)
        print(f"written: {output}, {numbers}")

    def _page(self, folders: Sequence[RunFolder], result: Comparison) -> str:
        source = self.plan.cohorts_path
        evidence = json.loads(Path(source).read_text()) if source is not None else None
        parts = [
            sections.overview(folders, result),
            sections.curves(folders, self.plan.label),
            sections.final_metrics(result),
            sections.cohort_metrics(result, source),
            sections.divergence(evidence, source),
            weights(folders),
        ]
        title = " against ".join([", ".join(self.names[1:]), self.names[0]]) if len(folders) > 1 else self.names[0]
        return page(title, "dist-rec report", parts)


def _in_words(found: Cohorts, cells: dict[str, int]) -> str:
    axes = [CutAxis(Axis(name, found.edges[name]), ()) for name in found.axes]
    return ", ".join(axis.describe(cells[axis.axis.name]) for axis in axes)


def _main(arguments: Sequence[str]) -> None:
    runs = [argument for argument in arguments if "=" not in argument or Path(argument).is_dir()]
    run(load(runs, [argument for argument in arguments if argument not in runs]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.report` and `dist-rec report`."""
    run_entry(_main, arguments, USAGE)


if __name__ == "__main__":
    main()
