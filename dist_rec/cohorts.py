"""Finds the two cohorts between which a trained run's predictions differ most: `dist-rec cohorts RUN DATA`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from dist_rec.config import RunConfig, from_mapping, read, split_options
from dist_rec.data.schema import Schema
from dist_rec.job import check_output, restore, run_entry
from dist_rec.metrics.axes import AxisError, Cut, CutAxis, Ranks, check_cuts, cut_axes, parse_cut
from dist_rec.metrics.cohorts import Bins, Division, Tally, choose, divide, to_mapping
from dist_rec.reporting.cohorts import pictures, table
from dist_rec.reporting.svg import document
from dist_rec.settings import Complaint, ConfigError, parse
from dist_rec.training.checkpoint import CheckpointError
from dist_rec.training.evaluation import predict
from dist_rec.training.report import to_json
from dist_rec.training.runtime import Runtime, process

USAGE = """usage: dist-rec cohorts RUN DATA [key=value ...]

Divides the rows of DATA into cohorts along each axis, compares the distributions of what a trained run predicts for
them, and takes the two cohorts that differ most: the head, for which it predicts more, and the tail. Writes
RUN/cohorts.json, which auxiliary losses read, and RUN/cohorts.svg, and prints a table.

RUN                      a run folder: its config.yaml and its checkpoints (the best one of an early-stopping run, else
                         the newest; evaluate.step=1000 takes another)
DATA                     a file, folder or glob, local or a URI; usually the training files

axes=occupation,age:10   the groups of the schema to divide by: NAME, each value is a cohort; NAME:10, ten of equal
                         size, cut at the quantiles of all rows; NAME:5%, the lowest and highest 5 %; NAME:18/25/35,
                         cut at these values. Default: every group that has few values, by value
pairs=true               also every two axes together (default: false)
divergence=js            js, kl, wasserstein or cosine, of the histograms of predicted log-odds (default: js)
bins=100 low=-10 high=10 the histograms; what lies beyond their ends counts in the first and last bin
min_mass=0.01            a cohort needs this share of the rows
min_positives=1000       and this many rows with label 1
max_values=100           an axis that is taken by value has at most this many
label=click              whose predictions (default: the schema's first binary label)
output=FILE.json         instead of RUN/cohorts.json; the picture is written beside it
run.device=cpu           keys with a dot override the run's config

On several ranks:  torchrun --nproc-per-node 2 -m dist_rec.cohorts RUN DATA [key=value ...]
On a cluster:      torchx run -s slurm launch/components.py:cohorts --run RUN --data DATA --ranks 8 --gpu 8 \\
                       -- [key=value ...]
"""

_SPLIT = "test"  # stands for DATA
_SHOWN = 10  # cohorts of an axis in a message


@dataclass
class CohortsConfig:
    """What follows RUN and DATA on the command line."""

    axes: str | list[str] | None = None
    pairs: bool = False
    divergence: Literal["js", "kl", "wasserstein", "cosine"] = "js"
    bins: int = 100
    low: float = -10.0
    high: float = 10.0
    min_mass: float = 0.01
    min_positives: int = 1000
    max_values: int = 100
    label: str | None = None
    output: str | None = None

    def check(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the options, for a run with this schema."""
        yield from check_cuts(self.cuts(schema), schema.groups)
        if not schema.groups:
            yield Complaint("axes", "cannot be found: the run's schema has no groups; declare schema.groups and train")
        if self.bins < 2:
            yield Complaint("bins", f"is {self.bins}; a distribution needs at least 2")
        if not -math.inf < self.low < self.high < math.inf:
            yield Complaint("low", f"is {self.low} and high is {self.high}; bins need two finite ends, low below high")
        if not 0 <= self.min_mass < 0.5:
            yield Complaint("min_mass", f"is {self.min_mass}; two cohorts must each have it: use 0 to 0.5")
        for name in ("min_positives", "max_values"):
            if getattr(self, name) < 1:
                yield Complaint(name, f"is {getattr(self, name)}; use at least 1")
        binary = [name for name, column in schema.labels.items() if column.kind == "binary"]
        if self.label is not None and self.label not in binary:
            yield Complaint("label", f"is '{self.label}', which is no binary label; known: {', '.join(binary)}")
        if self.output is not None:
            yield from check_output(self.output, ".json")
        if not binary:
            yield Complaint("label", "cannot be found: the schema has no binary label, so there are no log-odds")

    def cuts(self, schema: Schema) -> list[Cut | str]:
        """The axes that are asked for, or what is wrong with one; without any, all groups by value."""
        if self.axes is None:
            return [Cut(name) for name in schema.groups]
        names = self.axes.split(",") if isinstance(self.axes, str) else self.axes
        return [parse_cut(name.strip()) for name in names]

    def chosen_label(self, schema: Schema) -> int:
        """Number of the label whose predictions count."""
        names = list(schema.labels)
        return names.index(self.label or next(n for n in names if schema.labels[n].kind == "binary"))


def load(run: str, data: str, arguments: Sequence[str]) -> tuple[RunConfig, CohortsConfig]:
    """The config of a run folder with DATA as the split to be used, and the options.

    Raises ConfigError with all that is wrong with either.
    """
    card = Path(run) / "config.yaml"
    if not card.is_file():
        raise ConfigError([Complaint(run, "has no config.yaml; give the run.dir of a trained run, and then the data")])
    given, overrides = split_options(arguments)
    values = read(str(card), overrides)
    values["run"]["dir"], values["evaluate"]["split"] = run, _SPLIT
    values["data"] |= {_SPLIT: data, "synthetic": None}  # what is missing is an error, and is not made up
    config = from_mapping(values)
    complaints: list[Complaint] = []
    options: CohortsConfig = parse(CohortsConfig, given, complaints)
    complaints += options.check(config.schema) if not complaints else []
    if complaints:
        raise ConfigError(complaints)
    return config, options


def run(config: RunConfig, options: CohortsConfig) -> dict[str, Any]:
    """Finds the cohorts in this process, one rank of the job; returns what cohorts.json holds."""
    with process(config.run) as runtime:
        return _Search(config, options, runtime).run()


class _Search:
    """One job: cut the axes, count predictions, compare, write."""

    def __init__(self, config: RunConfig, options: CohortsConfig, runtime: Runtime) -> None:
        self.config, self.options, self.runtime = config, options, runtime
        self.trained = restore(config, runtime)
        self.bins = Bins(options.low, options.high, options.bins)
        self.label = options.chosen_label(config.schema)

    def run(self) -> dict[str, Any]:
        axes = self._axes()
        pairs = combinations(axes, 2) if self.options.pairs else ()
        tallies = [Tally(chosen, self.bins, self.runtime.device) for chosen in [*((axis,) for axis in axes), *pairs]]
        self._count(tallies)
        divisions = [self._divide(tally) for tally in tallies]
        choice = choose(divisions)
        if choice is None:
            raise ConfigError([Complaint("min_mass", self._too_small(divisions))])
        self._check_spread(choice.division)
        found = to_mapping(choice, divisions, self.bins, self.options.divergence) | self._identity()
        if self.runtime.is_main:
            self._write(found)
        return found

    def _axes(self) -> list[CutAxis]:
        cuts = [cut for cut in self.options.cuts(self.config.schema) if isinstance(cut, Cut)]
        names, data = [cut.name for cut in cuts], self.trained.data
        ranks = Ranks(self.runtime.gather, lambda counts: self.runtime.sum(torch.from_numpy(counts)).numpy())
        results = cut_axes(cuts, lambda: data.scan(_SPLIT, names), ranks, self.options.max_values)
        problems = [str(result) for result in results if isinstance(result, AxisError)]
        axes = [result for result in results if isinstance(result, CutAxis)]
        if problems and (self.options.axes is not None or not axes):
            raise ConfigError([Complaint("axes", problem) for problem in problems])
        if self.runtime.is_main:
            for problem in problems:
                print(f"left out: {problem}")
        return axes

    def _count(self, tallies: Sequence[Tally]) -> None:
        bad = torch.zeros((), dtype=torch.int64, device=self.runtime.device)
        for output in predict(self.trained.model, self.trained.data.once(_SPLIT), self.runtime):
            logits, labels, weights = output.predictions[:, self.label], output.labels[:, self.label], output.weights
            finite = logits.isfinite()
            bad += ((weights > 0) & ~finite).sum()
            for tally in tallies:
                tally.add(torch.where(finite, logits, 0.0), labels, weights, output.groups)
        count = int(self.runtime.sum(bad))
        if count:
            text = f"gives {count:,} rows a prediction that is NaN or infinite; evaluate the run, and train it anew"
            raise CheckpointError(f"{self.trained.checkpoint.path} {text}")

    def _divide(self, tally: Tally) -> Division:
        counts, options = self.runtime.sum(tally.counts).numpy(), self.options
        least = options.min_mass * int(counts[:, :-1].sum())
        return divide(
            tally.axes,
            counts,
            self.bins,
            options.divergence,
            min_rows=least,
            min_positives=options.min_positives,
        )

    def _check_spread(self, division: Division) -> None:
        """ConfigError if all rows are in one bin: no cohort differs from another, and any choice would be a chance."""
        whole = np.sum([cohort.histogram for cohort in [*division.cohorts, *division.others]], axis=0)
        if np.count_nonzero(whole) < 2:
            i = int(whole.argmax())
            end = " or beyond that end" if i in (0, len(whole) - 1) else ""
            text = f"is {self.bins.low} and high is {self.bins.high}, and all predicted log-odds are in the one bin at "
            text += f"{self.bins.centres[i]:g}{end}; set low and high around them, raise bins, or train the run further"
            raise ConfigError([Complaint("low", text)])

    def _too_small(self, divisions: Sequence[Division]) -> str:
        options = self.options
        rows = sum(cohort.rows for cohort in [*divisions[0].cohorts, *divisions[0].others])
        lines = [
            f"is {options.min_mass} ({options.min_mass * rows:,.0f} of {rows:,} rows) and min_positives is "
            f"{options.min_positives:,}, which no two cohorts of one axis reach; lower them, cut coarser, or give more "
            "data. The largest cohorts:"
        ]
        for division in divisions:
            largest = sorted([*division.cohorts, *division.others], key=lambda c: -c.rows)[:_SHOWN]
            lines += [f"    {c.name}: {c.rows:,} rows, {c.positives:,} positive" for c in largest]
        return "\n".join(lines)

    def _identity(self) -> dict[str, Any]:
        """What the cohorts were found with, the same on any number of ranks."""
        run, options = self.trained.checkpoint, self.options
        trained_with = json.dumps(run.meta["config"], sort_keys=True).encode()
        return {
            "label": list(self.config.schema.labels)[self.label],
            "columns": {name: group.origin for name, group in self.config.schema.groups.items()},
            "settings": {name: getattr(options, name) for name in ("min_mass", "min_positives", "pairs", "max_values")},
            "data": {"path": self.config.data.test, **self.trained.data.fingerprint(_SPLIT)},
            "run": {
                "dir": self.config.run.dir,
                "step": run.step,
                "config_sha256": hashlib.sha256(trained_with).hexdigest(),
            },
        }

    def _write(self, found: dict[str, Any]) -> None:
        path = Path(self.options.output or Path(self.config.run.dir) / "cohorts.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_one_line_lists(to_json(found, indent=1)) + "\n")
        picture = path.with_suffix(".svg")
        picture.write_text(document(pictures(found)) + "\n")
        print(
            f"step {found['run']['step']} of {found['run']['dir']}, {found['rows']:,} rows of {found['data']['path']}\n"
        )
        print(table(found))
        print(f"\nwritten: {path}, {picture}")


def _one_line_lists(text: str) -> str:
    """Indented JSON with each list of numbers in one line."""
    return re.sub(r"\[([\s\d.,e+-]+)\]", lambda found: f"[{' '.join(found[1].split())}]", text)


def _main(arguments: Sequence[str]) -> None:
    if len(arguments) < 2:
        raise ConfigError([Complaint("DATA", "is missing: dist-rec cohorts RUN DATA [key=value ...]")])
    run(*load(arguments[0], arguments[1], arguments[2:]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.cohorts` and `dist-rec cohorts`."""
    run_entry(_main, arguments, USAGE)


if __name__ == "__main__":
    main()
