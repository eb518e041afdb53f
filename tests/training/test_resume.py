"""A run that is stopped and continued is the run that was not stopped; on other ranks it loses and repeats no row."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dist_rec import train
from dist_rec.config import from_mapping
from dist_rec.training.checkpoint import Checkpoint, find
from tests.ranks import run_ranks

ROWS, GROUP_ROWS, BATCH = 1000, 130, 16
TABLES = {"user": "row_wise", "item": "table_wise", "tags": "data_parallel"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """1,000 rows in two files of uneven row groups, each row with an id of its own."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(5)
    table = pa.table(
        {
            "click": rng.integers(0, 2, ROWS).astype("float32"),
            "d0": rng.normal(size=ROWS).astype("float32"),
            "user": rng.integers(0, 203, ROWS),
            "item": rng.integers(0, 101, ROWS),
            "tags": [rng.integers(0, 57, n).tolist() for n in rng.integers(0, 4, ROWS)],
            "row": np.arange(ROWS),
        }
    )
    pq.write_table(table.slice(0, 700), folder / "a.parquet", row_group_size=GROUP_ROWS)
    pq.write_table(table.slice(700), folder / "b.parquet", row_group_size=GROUP_ROWS)
    return folder


def _values(data: Path, folder: Path, **train_settings) -> dict:
    return {
        "schema": {
            "labels": {"click": None},
            "dense": {"d0": None},
            "sparse": {"user": {"num_ids": 203}, "item": {"num_ids": 101}, "tags": {"num_ids": 57, "multi": True}},
            "groups": {"row": {"column": "row"}},
        },
        "data": {"train": str(data), "validation": str(data), "batch_size": BATCH, "shuffle_rows": 100},
        "model": {"name": "dlrm", "dim": 8, "bottom": [16], "top": [16], "dropout": 0.2},
        "embeddings": {"tables": {table: {"sharding": kind} for table, kind in TABLES.items()}},
        "optim": {"dense": {"name": "adamw", "lr": 0.01}, "schedule": {"warmup_steps": 9}, "clip_norm": 1.0},
        "run": {"dir": str(folder), "device": "cpu"},
        "train": {"epochs": 2, "eval_every": 11, **train_settings},
        "metrics": {"grouped_auc": ["row"], "window_rows": 10 * ROWS},  # the window then tells which rows were trained
        "checkpoint": {"every": 7, "keep": 100},
        "report": {"every": 5, "tensorboard": False},
    }


def _train(rank: int, world_size: int, runs: list[dict]) -> None:
    for values in runs:
        train.run(from_mapping(values))


def _reports(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], line["examples"], line["metrics"]) for line in lines]


def _weights(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in checkpoint.path.glob("*.distcp")}


def _rows_trained(checkpoint: Checkpoint) -> Counter:
    states = [torch.load(p, weights_only=True)["own"]["window"] for p in checkpoint.path.glob("rank-*.pt")]
    # padding rows have weight 0, the last of the stored values
    return Counter(int(r) for s in states for r in s["group.row"][s["values"][:, -1] > 0])


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_is_bit_identical_to_uninterrupted(data, tmp_path, world_size):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_ranks(
        _train,
        world_size,
        [
            _values(data, whole, steps=40),
            _values(data, halves, steps=20),
            _values(data, halves, steps=40),
        ],
    )
    one, two = find(whole / "checkpoints")[-1], find(halves / "checkpoints")[-1]
    assert one.step == two.step == 40
    assert _weights(one) and _weights(one) == _weights(two)
    mid = [r for r in _reports(halves) if r[0] != 20]  # the first half also reports at its own end
    assert mid == [r for r in _reports(whole) if r[0] != 20]
    results = [json.loads((f / "result.json").read_text()) for f in (whole, halves)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["examples"] == results[1]["examples"]


def test_every_row_once_per_epoch_across_changes_of_world_size(data, tmp_path):
    folder = tmp_path / "run"
    path = [(2, 14), (3, 23), (1, 47), (2, 60), (3, 1000)]
    for world_size, steps in path:
        run_ranks(_train, world_size, [_values(data, folder, steps=steps)])
    last = find(folder / "checkpoints")[-1]
    rows = _rows_trained(last)
    assert len(rows) == ROWS
    assert set(rows.values()) == {2}
    assert last.meta["progress"]["examples"] == 2 * ROWS


def test_a_damaged_newest_checkpoint_is_passed_over(data, tmp_path, caplog):
    folder = tmp_path / "run"
    run_ranks(_train, 1, [_values(data, folder, steps=14)])
    newest = find(folder / "checkpoints")[-1]
    assert newest.step == 14
    part = next(newest.path.glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    (folder / "checkpoints" / ".step-00000021.tmp").mkdir()  # as a kill during a save leaves it
    found = find(folder / "checkpoints")
    assert [c.step for c in found] == [7]
    assert part.name in caplog.text
    run_ranks(_train, 1, [_values(data, folder, steps=21)])
    assert [c.step for c in find(folder / "checkpoints")] == [7, 14, 21]
    assert not list((folder / "checkpoints").glob(".step-*"))


def test_retention_keeps_the_newest(data, tmp_path):
    values = _values(data, tmp_path / "run", steps=30)
    values["checkpoint"]["keep"] = 2
    run_ranks(_train, 1, [values])
    assert [c.step for c in find(tmp_path / "run" / "checkpoints")] == [28, 30]


def test_evaluation_does_not_change_training(data, tmp_path):
    often, never = _values(data, tmp_path / "often", steps=30), _values(data, tmp_path / "never", steps=30)
    often["train"]["eval_every"] = 3
    never["train"]["eval_every"] = None
    run_ranks(_train, 2, [often, never])
    one, two = (find(tmp_path / name / "checkpoints")[-1] for name in ("often", "never"))
    assert _weights(one) == _weights(two)
    assert _rows_trained(one) == _rows_trained(two)


def test_a_finished_run_is_not_trained_further(data, tmp_path):
    values = _values(data, tmp_path / "run", steps=9)
    run_ranks(_train, 1, [values, values])
    assert [c.step for c in find(tmp_path / "run" / "checkpoints")] == [7, 9]
    shutil.rmtree(tmp_path / "run")
