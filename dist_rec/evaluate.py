"""Evaluates a trained run: `python -m dist_rec.evaluate CONFIG [key=value ...]`, on any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dist_rec.config import RunConfig
from dist_rec.data.ids import describe_policies
from dist_rec.data.schema import Schema
from dist_rec.job import load_config, restore, run_entry
from dist_rec.metrics.rows import Rows
from dist_rec.serving.scores import score_columns
from dist_rec.settings import Complaint, ConfigError
from dist_rec.training.evaluation import evaluate
from dist_rec.training.report import format_table, to_json
from dist_rec.training.runtime import Runtime, check_writable, process

USAGE = """usage: dist-rec evaluate CONFIG [key=value ...]

Loads the weights of a run from run.dir, evaluates a split, prints the metrics and writes them to
run.dir/evaluation-<split>.json. CONFIG is the one the run was trained with, or the config.yaml in its folder.

Overrides:
  run.dir=runs/mine                the run whose checkpoints are read
  evaluate.split=test              train, validation or test (default: test)
  evaluate.step=1000               which checkpoint; default: the best of an early-stopping run, else the newest
  evaluate.predictions=out.parquet also write every row of weight > 0, in the order of the files: logit_<label>,
                                   probability_<label> (of binary labels), label_<label>, weight, and a column per group
                                   of the schema
  data.test=PATH                   evaluate other files
  metrics.information_abundance=true metrics.correlation=[expert_*]   diagnose tables and representations too

On several ranks:  torchrun --nproc-per-node 2 -m dist_rec.evaluate CONFIG [key=value ...]
"""


def run(config: RunConfig) -> dict[str, Any]:
    """Evaluates by `config` in this process, one rank of the job; returns step, split and metrics."""
    with process(config.run) as runtime:
        return _run(config, runtime)


def _run(config: RunConfig, runtime: Runtime) -> dict[str, Any]:
    split, folder = config.evaluate.split, Path(config.run.dir)
    # of rank 0, which alone writes: the place need not be there on other nodes
    problems = runtime.broadcast(list(_check_predictions(config)) if runtime.is_main else None)
    if problems:
        raise ConfigError(problems)
    trained = restore(config, runtime)
    groups = list(config.schema.groups) if config.evaluate.predictions else None
    loader, task = trained.data.once(split), trained.data.task(split)
    found = evaluate(trained.model, loader, config.schema, config.metrics, runtime, groups, trained.diagnostics, task)
    step, path = trained.checkpoint.step, trained.checkpoint.path
    result = {"step": step, "split": split, "metrics": found.metrics, "data_policies": found.policies}
    if found.diagnostics:
        result["diagnostics"] = found.diagnostics
    if found.rows is not None:
        (folder / f"evaluation-{split}.json").write_text(to_json(result, indent=1))
        print(f"step {step}, {path}")
        print(format_table({split: found.metrics}))
        if found.diagnostics:
            print("\n".join(f"{name}  {value:.5f}" for name, value in found.diagnostics.items()))
        if found.policies:
            print(describe_policies(found.policies))
        if config.evaluate.predictions:
            print(f"predictions: {config.evaluate.predictions}")
            write_predictions(found.rows, config.schema, Path(config.evaluate.predictions))
    return result


def _check_predictions(config: RunConfig) -> Iterator[Complaint]:
    key, path = "evaluate.predictions", config.evaluate.predictions
    if path is not None and Path(path).is_dir():
        yield Complaint(key, f"is '{path}', which is a folder; name a file")
    elif path is not None:
        yield from check_writable(Path(path).parent, key)


def write_predictions(rows: Rows, schema: Schema, path: Path) -> None:
    """Rows as Parquet, in their order: the columns of `score_columns`, label_<label>, weight, one per group."""
    columns: dict[str, Any] = score_columns(rows.predictions, schema)
    columns |= {f"label_{label}": rows.labels[:, i] for i, label in enumerate(schema.labels)}
    columns |= {"weight": rows.weights, **rows.groups}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def _main(arguments: Sequence[str]) -> None:
    run(load_config(arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.evaluate` and `dist-rec evaluate`."""
    run_entry(_main, arguments, USAGE)


if __name__ == "__main__":
    main()
