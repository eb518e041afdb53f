"""The study of real data, on its smallest piece: MovieLens, one model, one sharding, some ten steps on 2 ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.config import load
from scripts.studies import real_data

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared/data"

needs_data = pytest.mark.skipif(
    not (DATA / real_data.SETS["ml100k"].file).is_file(),
    reason=f"the data sets may not be copied into the project, and {DATA} does not have them",
)


def test_folds_predict_every_row_once_and_train_on_no_row_they_judge() -> None:
    parts = list(real_data.splits("folds", 1003))
    assert [name for name, _ in parts] == [f"fold{i}" for i in range(5)]
    for column in (1, 2):  # validation, test
        rows = np.concatenate([split[column] for _, split in parts])
        assert len(np.unique(rows)) == len(rows)
    assert len(np.concatenate([test for _, (_, _, test) in parts])) == 1003
    for _, split in parts:
        assert sorted(np.concatenate(split)) == list(range(1003))


@pytest.mark.parametrize("kind", ["time", "random"])
def test_a_single_split_is_80_10_10(kind: str) -> None:
    ((_, split),) = real_data.splits(kind, 1000)
    assert [len(rows) for rows in split] == [800, 100, 100]
    assert sorted(np.concatenate(split)) == list(range(1000))
    assert (kind == "time") == (np.concatenate(split).tolist() == list(range(1000)))


def test_ids_unseen_in_train_become_0_in_lists_too() -> None:
    config = load(str(real_data.card("ml100k", "dlrm")))
    single = {name: [3, 7, 5] for name in config.schema.sparse if name != "genres"}
    rows = pa.table(single | {"genres": [[3, 9], [], [7, 5]]})
    train = rows.take([0]).set_column(0, rows.column_names[0], [[5]])
    found = real_data.with_seen_ids(rows, train, config).to_pydict()
    first, *others = single
    assert found[first] == [0, 0, 5]
    assert all(found[name] == [3, 0, 0] for name in others)
    assert found["genres"] == [[3, 9], [], [0, 0]]


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"ratings.parquet does not exist; give the folder .* with --data"):
        real_data.main(["--data", str(tmp_path), "--sets", "ml100k"])


@needs_data
def test_one_small_training_ends_in_the_table(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/studies/real_data.py", "--data", str(DATA), "--work", str(tmp_path)]
    command += ["--sets", "ml100k", "--models", "dlrm", "--shardings", "table_wise", "--seeds", "0"]
    command += ["--overrides", "train.steps=40", "train.eval_every=20"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    row = done.stdout.strip().splitlines()[-1]
    assert row.startswith("| ml100k | dlrm | table_wise | 0.")
    test = pq.read_table(tmp_path / "ml100k/all/test.parquet")
    assert len(test) == 10_000 and "rating" not in test.column_names
    assert 0.5 < float(row.split("|")[4]) < 0.76  # learns something, and sees no rating
