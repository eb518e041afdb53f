"""Small runs from Parquet files to a run folder, for the tests of the entries and of training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dist_rec import train
from dist_rec.config import from_mapping
from dist_rec.training.checkpoint import Checkpoint

USERS, ITEMS, TAGS, DOMAINS = 203, 101, 57, 3


def table(rows: int, seed: int = 5) -> pa.Table:
    """`rows` rows with a label that can be learnt, and a column "row" that tells them apart."""
    rng = np.random.default_rng(seed)
    user, item, d0 = rng.integers(0, USERS, rows), rng.integers(0, ITEMS, rows), rng.normal(size=rows)
    logit = d0 + np.sin(user) + np.cos(item)
    return pa.table(
        {
            "click": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype("float32"),
            "d0": d0.astype("float32"),
            "user": user,
            "item": item,
            "tags": [rng.integers(0, TAGS, n).tolist() for n in rng.integers(0, 4, rows)],
            "domain": rng.integers(0, DOMAINS, rows),
            "row": np.arange(rows),
        }
    )


def write(folder: Path, rows: int, *, row_group: int = 130, seed: int = 5) -> Path:
    """`table` in two files of uneven row groups."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, first = table(rows, seed), rows * 7 // 10
    pq.write_table(whole.slice(0, first), folder / "a.parquet", row_group_size=row_group)
    pq.write_table(whole.slice(first), folder / "b.parquet", row_group_size=row_group)
    return folder


def values(data: Path | str, folder: Path | str, /, **sections: Any) -> dict[str, Any]:
    """The mapping of a small run on `data`; `sections` are merged into it, level by level."""
    base = {
        "schema": {
            "labels": {"click": None},
            "dense": {"d0": None},
            "sparse": {
                "user": {"num_ids": USERS},
                "item": {"num_ids": ITEMS},
                "tags": {"num_ids": TAGS, "multi": True, "mean_length": 1.5},
            },
            "groups": {"row": {"column": "row"}, "domain": {"column": "domain"}, "user": {"column": "user"}},
        },
        "data": {"train": str(data), "batch_size": 16, "shuffle_rows": 100},
        "model": {"name": "dlrm", "dim": 8, "bottom": [16], "top": [16]},
        "run": {"dir": str(folder), "device": "cpu"},
        "report": {"every": 5, "tensorboard": False},
    }
    return merged(base, sections)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, level by level."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def train_all(rank: int, world_size: int, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trains one run after the other; for `run_ranks`."""
    return [train.run(from_mapping(run)) for run in runs]


def reports(folder: Path, split: str | None = None) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, of one split or of all."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if split in (None, line["split"])]


def rows_trained(checkpoint: Checkpoint) -> Counter[int]:
    """Row -> how often it was trained on, by the window of the metrics, which must have kept group "row" and all."""
    states = [torch.load(p, weights_only=True)["own"]["window"] for p in checkpoint.path.glob("rank-*.pt")]
    # padding rows have weight 0, the last of the stored values
    return Counter(int(r) for s in states for r in s["group.row"][s["values"][:, -1] > 0])
