"""Many small trainings for a study: one rank each, in worker processes that live on, every outcome kept on disk.

A trial is a config, settings on top of it, and a folder with train.parquet, validation.parquet and test.parquet. It
goes through the real entries, `dist_rec.train` and `dist_rec.evaluate`, in this process instead of one of its own: an
interpreter that imports torchrec costs more than a training on 60,000 rows. What a trial found lies under the study's
work folder, named after all that went into it, and is not computed again: a study that was stopped goes on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pyarrow.parquet as pq

from dist_rec.config import read

SPLITS = ("train", "validation", "test")
EVALUATION_ROWS = 2048
"""Of a batch, at least: metrics do not depend on it, and at the cards' 128 evaluation takes a third of the time."""


@dataclass(frozen=True)
class Trial:
    """One training and the evaluation of its best checkpoint on `split`.

    Attributes:
        card: a config file. overrides: key=value settings on top of it.
        part: folder with <split>.parquet for every split. split: where predictions are wanted.
    """

    card: Path
    overrides: tuple[str, ...]
    part: Path
    split: str = "test"

    @property
    def name(self) -> str:
        """A name for the outcome: it changes with the settings, whatever file they come from, and the data's files.

        Not with comments, so that a card can tell what a study found without the study beginning anew. Nor with the
        code: after a change of what a model computes, give another work folder.
        """
        files = [(self.part / f"{split}.parquet").stat() for split in SPLITS]
        settings = json.dumps(read(str(self.card), self.overrides), sort_keys=True)
        facts = [settings, str(self.part), self.split]
        facts += [f"{file.st_size} {file.st_mtime_ns}" for file in files]
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Outcome:
    """What a trial found.

    Attributes:
        columns: of the predictions, rows in file order: logit_<label>, label_<label>, weight, and the schema's groups.
        metrics: of the split. result: what result.json of the training holds.
        diagnostics: of tables and representations, those that the card asks for.
    """

    columns: dict[str, np.ndarray]
    metrics: dict[str, float]
    result: dict[str, Any]
    diagnostics: dict[str, float] = field(default_factory=dict)


def outcomes(trials: Sequence[Trial], work: Path, processes: int = 1) -> Iterator[Outcome]:
    """The outcomes of `trials`, in their order; `processes` of them are trained at a time, on one core each."""
    folder = work.absolute() / "trials"
    folder.mkdir(parents=True, exist_ok=True)
    todo = [(trial, folder) for trial in trials]
    # spawned: torch, OpenMP and gloo start threads, which a fork would not have
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"
    with context.Pool(processes) as pool:
        for i, (trial, problem) in enumerate(zip(trials, pool.imap(_run, todo), strict=True)):
            if problem:
                raise SystemExit(f"error: trial {i}, {trial}:\n{problem}")
            yield _read(folder / trial.name)


def _run(task: tuple[Trial, Path]) -> str:
    """Trains and evaluates, unless that has been done; returns what went wrong."""
    trial, folder = task
    final = folder / trial.name
    if final.exists():
        return ""
    run = folder / f".{trial.name}.{os.getpid()}"
    shutil.rmtree(run, ignore_errors=True)
    run.mkdir()
    try:
        with (run / "log").open("w") as log, redirect_stdout(log), redirect_stderr(log):
            _train(trial, run)
    except BaseException:  # noqa: BLE001 - shown by the parent, with the trial
        return traceback.format_exc()
    shutil.rmtree(run / "checkpoints")
    try:
        run.rename(final)
    except OSError:
        if not final.exists():
            raise
        shutil.rmtree(run)  # another study with the same work folder was faster
    return ""


def _train(trial: Trial, run: Path) -> None:
    from dist_rec import evaluate, train
    from dist_rec.config import load
    from dist_rec.job import quiet_libraries

    quiet_libraries()
    logging.getLogger("dist_rec").setLevel(logging.WARNING)
    fixed = [f"run.dir={run}", "run.device=cpu", "report.tensorboard=false"]
    paths = [f"data.{split}={trial.part / split}.parquet" for split in SPLITS]
    wanted = [f"evaluate.split={trial.split}", f"evaluate.predictions={run / 'predictions.parquet'}"]
    config = load(str(trial.card), [*fixed, *paths, *wanted, *trial.overrides])
    config.data.eval_batch_size = max(config.data.eval_batch_size or config.data.batch_size, EVALUATION_ROWS)
    train.run(config)
    evaluate.run(config)
    sys.stdout.flush()


def _read(folder: Path) -> Outcome:
    rows = pq.read_table(folder / "predictions.parquet")
    evaluation = json.loads(next(folder.glob("evaluation-*.json")).read_text())
    return Outcome(
        {name: rows[name].to_numpy() for name in rows.column_names},
        evaluation["metrics"],
        json.loads((folder / "result.json").read_text()),
        evaluation.get("diagnostics", {}),
    )


def interval(figures: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Mean and half-width of its confidence interval (Student's t), for figures of independent seeds or folds.

    The half-width of fewer than two figures is nan.
    """
    n = len(figures)
    if n < 2:
        return float(np.mean(figures)), float("nan")
    quantile = _student_quantile(n - 1, confidence)
    return float(np.mean(figures)), float(quantile * np.std(figures, ddof=1) / n**0.5)


@functools.cache
def _student_quantile(degrees: int, confidence: float) -> float:
    """t with P(|T| <= t) = confidence: P(|T| > t) is the regularised incomplete beta function of v / (v + t^2)."""

    def excess(t: float) -> float:
        x = degrees / (degrees + t * t)
        return float(mpmath.betainc(degrees / 2, 0.5, 0, x, regularized=True)) - (1 - confidence)

    return float(mpmath.findroot(excess, (0.1, 1000.0), solver="bisect", tol=1e-20, maxsteps=200))
