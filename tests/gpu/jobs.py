"""Small training jobs for the GPU tests: their data, their configs, and what they leave behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from dist_rec import train
from dist_rec.config import from_mapping
from dist_rec.training.checkpoint import find

ROWS, BATCH, STEPS = 4096, 64, 40
IDS = {"user": 997, "item": 101, "tags": 57, "hour": 24}


def write_data(folder: Path, *, broken_row: int | None = None, every_id_in_every_batch: bool = False) -> Path:
    """Click rows whose label depends on the dense columns and on two ids, so that there is something to learn.

    broken_row: this row and the next three have dense values that overflow float32 in the first layer, in all
        combinations of signs, as a ReLU hides some.
    every_id_in_every_batch: for any batch size that is a multiple of 8, without shuffle.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(11)
    dense = rng.normal(size=(ROWS, 2)).astype(np.float32)
    ids = {name: rng.integers(0, n, ROWS) for name, n in IDS.items() if name != "tags"}
    tags = [rng.integers(0, IDS["tags"], n).tolist() for n in rng.integers(0, 5, ROWS)]
    if every_id_in_every_batch:  # the first eight of them; the others are in none
        ids, tags = {name: np.arange(ROWS) % 8 for name in ids}, [[i % 8, (i + 1) % 8] for i in range(ROWS)]
    score = dense[:, 0] + rng.normal(size=IDS["item"])[ids["item"]] + rng.normal(size=IDS["hour"])[ids["hour"]]
    if broken_row is not None:
        dense[broken_row : broken_row + 4] = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * 3e38
    columns = {"click": (score > 0.5).astype(np.float32), "d0": dense[:, 0], "d1": dense[:, 1], **ids, "tags": tags}
    pq.write_table(pa.table(columns), folder / "part.parquet", row_group_size=500)
    return folder


def mapping(data: Path, folder: Path, device: str, **changes: Any) -> dict[str, Any]:
    """The config of a job; the window of metrics is one batch, so each report's log_loss is that step's loss.

    changes: `section__key` = value.
    """
    sparse = {name: {"num_ids": n} for name, n in IDS.items()}
    sparse["tags"] |= {"multi": True, "mean_length": 2.0}
    values: dict[str, Any] = {
        "schema": {"labels": {"click": None}, "dense": {"d0": None, "d1": None}, "sparse": sparse},
        "data": {"train": str(data), "validation": str(data), "batch_size": BATCH, "shuffle_rows": 1000},
        "model": {"name": "dlrm", "dim": 8, "bottom": [32], "top": [32, 16]},
        "embeddings": {"sharding": "table_wise", "init_bound": 0.3},
        "sharding": {},
        "optim": {"tables": {"lr": 0.05}, "dense": {"name": "adagrad", "lr": 0.05}},
        "run": {"dir": str(folder), "device": device, "seed": 3},
        "train": {"epochs": None, "steps": STEPS},
        "metrics": {"window_rows": BATCH},
        "checkpoint": {"every": 1000, "keep": 1000},
        "report": {"every": 1, "tensorboard": False},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values.setdefault(section, {})[name] = value
    return values


def run(data: Path, folder: Path, device: str, **changes: Any) -> dict[str, Any]:
    """Trains in this process, one rank; returns what result.json holds."""
    return train.run(from_mapping(mapping(data, folder, device, **changes)))


def losses(folder: Path) -> list[float]:
    """The loss of every step of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"]["log_loss"] for line in lines if line["split"] == "train"]


def state(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """Every whole tensor of a run's checkpoint, weights and optimiser state, by dotted name; the newest by default."""
    found = find(folder / "checkpoints")
    checkpoint = next(c for c in reversed(found) if step in (None, c.step))
    file = folder / f"state-{checkpoint.step}.pt"
    dcp_to_torch_save(checkpoint.path, file)
    return dict(_tensors(torch.load(file, weights_only=False, map_location="cpu"), ""))


def _tensors(tree: Any, name: str) -> list[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        return [(name, tree.detach())]
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in _tensors(value, f"{name}/{key}")]
    return []


def weights(folder: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    """The parameters of a run's checkpoint; the newest by default."""
    return {name: x for name, x in state(folder, step).items() if name.startswith("/model/")}


def update_error(one: Path, other: Path, first: int = 1) -> dict[str, float]:
    """parameter -> |du - dv| / |dv|, of the updates that two runs made between step `first` and their ends."""
    starts, ends = [weights(f, first) for f in (one, other)], [weights(f) for f in (one, other)]
    assert set(ends[0]) == set(ends[1]) and ends[0]
    errors = {}
    for name in ends[0]:
        u, v = (end[name] - start[name] for start, end in zip(starts, ends, strict=True))
        assert v.norm() > 0, f"{name} did not train"
        errors[name] = float((u - v).norm() / v.norm())
    return errors
