"""Quality of DLRM and DCN-V2 on the three real data sets: AUC and NE through the real entries, on 2 CPU ranks.

    .venv/bin/python scripts/studies/real_data.py [--data ../shared/data] [--work .data] [--sets ...] [--models ...]
                                                  [--shardings ...] [--seeds ...] [--overrides key=value ...]

Prepares the splits as Parquet under --work, then for every set, model, sharding and seed: trains the experiment card
configs/<set>/<model>.yaml with torchrun, early stopping on validation data; evaluates the best checkpoint on the test
rows with `dist_rec.evaluate`; and at the end prints one Markdown table. --overrides are settings of every training, on
top of its card. The data must not enter the repository: --work is ignored by git, or lies elsewhere.

Protocol, that of the data's README: 80/10/10 by `numpy.random.default_rng(20261123).permutation(n)`, first 80 %
train; ml100k in its order of time instead; criteo1tb_80k in five folds of that permutation, each predicted by a model
trained on the other four (a tenth of their rows is the validation set, different rows for each fold), metrics of all
predictions together. Ids unseen in train become 0. Dense columns are transformed by the schema.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dist_rec.config import RunConfig, load
from dist_rec.metrics.binary import auc, normalized_entropy

ROOT = Path(__file__).parents[2]
SEED_OF_SPLITS = 20261123
RANKS = 2
ROW_GROUP_ROWS = 16384
SPLITS = ("train", "validation", "test")


class DataSet(NamedTuple):
    """A file of the data folder, how it is split, and what an untuned DeepFM reached on it (the data's README)."""

    file: str
    split: str
    auc: float
    ne: float
    auc_se: float


SETS = {
    "criteo1tb_80k": DataSet("criteo1tb_80k/criteo1tb_80k_idx.parquet", "folds", 0.7197, 0.9278, 0.0055),
    "ml100k": DataSet("ml100k/ratings.parquet", "time", 0.7125, 0.9013, 0.005),
    "yelp_hin": DataSet("yelp_hin/reviews.parquet", "random", 0.7162, 0.8975, 0.0036),
}
MODELS = ("dlrm", "dcn")
SHARDINGS = ("table_wise", "row_wise")
Rows = np.ndarray
"""Row numbers of a file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, prepares, trains, evaluates and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=ROOT / ".data", help="where splits and runs go")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shardings", nargs="+", choices=SHARDINGS, default=list(SHARDINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--overrides", nargs="+", metavar="key=value", default=[], help="settings of every training")
    args = parser.parse_args(arguments)
    args.work = args.work.absolute()  # the jobs run in the repository's root
    for name in args.sets:
        source(name, args.data)
    results: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for name in args.sets:
        parts = prepare(name, args.data, args.work / name)
        for model in args.models:
            for seed in args.seeds:
                for sharding in args.shardings:
                    folder = args.work / "runs" / f"{name}-{model}-{sharding}-seed{seed}"
                    overrides = [f"run.seed={seed}", f"embeddings.sharding={sharding}", *args.overrides]
                    tested = [run(card(name, model), part, folder / part.name, overrides) for part in parts]
                    score = pooled(tested)
                    results[name, model, sharding].append(score)
                    print(f"{name} {model} {sharding} seed {seed}: AUC {score[0]:.4f} NE {score[1]:.4f}", flush=True)
    print("\n" + "\n".join(table(results)))


def card(name: str, model: str) -> Path:
    """The experiment card of a model on a data set."""
    return ROOT / "configs" / name / f"{model}.yaml"


def source(name: str, data: Path) -> Path:
    """The file of a data set; ends the program with its path if it is not there."""
    file = data / SETS[name].file
    if not file.is_file():
        raise SystemExit(f"error: {file} does not exist; give the folder of the data sets with --data")
    return file


def prepare(name: str, data: Path, folder: Path) -> list[Path]:
    """Writes the splits of a data set under `folder`; returns the folders with train, validation and test in them.

    Only the columns of the schema are written: what is no feature there (the rating behind the label) stays out.
    """
    config = load(str(card(name, MODELS[0])))
    rows = pq.read_table(source(name, data), columns=config.schema.columns())
    return write_parts(rows, SETS[name].split, folder, config)


def write_parts(rows: pa.Table, split_kind: str, folder: Path, config: RunConfig) -> list[Path]:
    """Writes the splits of `rows`, which come in the file's order, with ids unseen in training as 0; as `prepare`."""
    parts = []
    for part, split in splits(split_kind, len(rows)):
        parts.append(folder / part)
        parts[-1].mkdir(parents=True, exist_ok=True)
        train = rows.take(split[0])
        for split_name, index in zip(SPLITS, split, strict=True):
            written = with_seen_ids(rows.take(index), train, config)
            pq.write_table(written, parts[-1] / f"{split_name}.parquet", row_group_size=ROW_GROUP_ROWS)
    return parts


def splits(kind: str, n: int) -> Iterator[tuple[str, tuple[Rows, Rows, Rows]]]:
    """(folder name, (train, validation, test)) for each model that has to be trained."""
    if kind == "folds":
        folds = np.array_split(np.random.default_rng(SEED_OF_SPLITS).permutation(n), 5)
        for i, test in enumerate(folds):
            following, *others = folds[i + 1 :] + folds[:i]
            validation, rest = np.split(following, [len(following) * 2 // 5])
            yield f"fold{i}", (np.concatenate([rest, *others]), validation, test)
        return
    order = np.arange(n) if kind == "time" else np.random.default_rng(SEED_OF_SPLITS).permutation(n)
    train, validation, test = np.split(order, [n * 8 // 10, n * 9 // 10])
    yield "all", (train, validation, test)


def with_seen_ids(rows: pa.Table, train: pa.Table, config: RunConfig) -> pa.Table:
    """`rows` with every id that `train` does not have replaced by 0."""
    for name in config.schema.sparse:
        column, known = rows[name].combine_chunks(), train[name].combine_chunks()
        if pa.types.is_list(column.type):
            # flatten, not values: a slice or a null leaves ids in `values` that belong to no row
            values = seen(column.flatten(), known.flatten())
            lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            column = pa.ListArray.from_arrays(offsets, values)
        else:
            column = seen(column, known)
        rows = rows.set_column(rows.schema.get_field_index(name), name, column)
    return rows


def seen(ids: pa.Array, known: pa.Array) -> pa.Array:
    """`ids` with 0 in place of those that are not in `known`."""
    return pc.if_else(pc.is_in(ids, value_set=pc.unique(known)), ids, 0)


def run(config: Path, part: Path, folder: Path, overrides: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Trains `config` on `part` and evaluates the best checkpoint on its test rows; returns their logits and labels."""
    shutil.rmtree(folder, ignore_errors=True)  # a folder with checkpoints would be continued, not trained anew
    settings = [f"run.dir={folder}", "run.device=cpu", *(f"data.{s}={part / s}.parquet" for s in SPLITS), *overrides]
    torchrun("dist_rec.train", str(config), *settings, log=folder / "train.log")
    predictions = folder / "predictions.parquet"
    torchrun(
        "dist_rec.evaluate", str(config), *settings, f"evaluate.predictions={predictions}", log=folder / "evaluate.log"
    )
    shutil.rmtree(folder / "checkpoints")
    rows = pq.read_table(predictions)
    return rows["logit_label"].to_numpy(), rows["label_label"].to_numpy()


def torchrun(module: str, *arguments: str, log: Path) -> None:
    """One job of `RANKS` ranks on this machine; its output goes to `log`, and is shown if the job fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", module]
    with log.open("w") as out:
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=out
        )
    if done.returncode:
        raise SystemExit(f"error: {module} ended with {done.returncode}; the end of {log}:\n{log.read_text()[-4000:]}")


def pooled(tested: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """AUC and NE of the (logits, labels) of all parts together."""
    logits, labels = (np.concatenate(arrays) for arrays in zip(*tested, strict=True))
    weights = np.ones(len(labels))
    return auc(logits, labels, weights), normalized_entropy(logits, labels, weights)


def table(results: dict[tuple[str, str, str], list[tuple[float, float]]]) -> Iterator[str]:
    """The results as Markdown: means over seeds, and the standard deviation of one seed where there are several."""
    yield "| data | model | sharding | AUC | NE | DeepFM AUC (s.e.) / NE | AUC against DeepFM |"
    yield "|---|---|---|---|---|---|---|"
    for (name, model, sharding), scores in results.items():
        reference, means = SETS[name], np.mean(scores, axis=0)
        spread = np.std(scores, axis=0, ddof=1) if len(scores) > 1 else None
        cells = [f"{mean:.4f}" + (f" ± {spread[i]:.4f}" if spread is not None else "") for i, mean in enumerate(means)]
        against = f"{(means[0] - reference.auc) / reference.auc_se:+.1f} s.e."
        known = f"{reference.auc:.4f} ({reference.auc_se:.4f}) / {reference.ne:.4f}"
        yield f"| {name} | {model} | {sharding} | {cells[0]} | {cells[1]} | {known} | {against} |"


if __name__ == "__main__":
    main()
