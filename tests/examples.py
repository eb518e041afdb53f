"""Small schemas, configs and batches that several tests use. Everything is a function of its arguments."""

from __future__ import annotations

from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.config import RunConfig, from_mapping
from dist_rec.data.batch import Batch
from dist_rec.data.schema import Schema

IDS = {"user": 203, "item": 101, "tags": 57, "hour": 24, "query": 101}
COHORTS: dict[str, Any] = {
    "axes": ["domain"],
    "edges": {"domain": None},
    "head": {"domain": 2},
    "tail": {"domain": 0},
    "head_rate": 0.15,
    "tail_rate": 0.1,
    "head_mass": 0.3,
    "tail_mass": 0.3,
}
"""What a cohorts.json says, of a group "domain" of three values."""


def mapping(**sections: Any) -> dict[str, Any]:
    """A config with one dense part, single and multi-valued features, and a table shared by two of them."""
    values = {
        "schema": {
            "labels": {"click": None},
            "dense": {"d0": None, "d1": None, "d2": None},
            "sparse": {
                "user": {"num_ids": IDS["user"]},
                "item": {"num_ids": IDS["item"], "table": "items"},
                "tags": {"num_ids": IDS["tags"], "multi": True, "mean_length": 2.0},
                "hour": {"num_ids": IDS["hour"]},
                "query": {"num_ids": IDS["query"], "multi": True, "mean_length": 2.0, "table": "items"},
            },
        },
        "data": {"train": "unused", "batch_size": 12},
        "model": {"name": "dlrm", "dim": 8, "bottom": [16], "top": [16]},
        "run": {"device": "cpu", "seed": 3},
    }
    for section, content in sections.items():
        old = values.get(section)
        values[section] = {**old, **content} if isinstance(old, dict) and section != "model" else content
    return values


def config(**sections: Any) -> RunConfig:
    """`mapping`, checked and typed."""
    return from_mapping(mapping(**sections))


def global_batch(schema: Schema, step: int, rows: int) -> Batch:
    """Batch number `step` of all ranks together: `rows` rows, bags of 0 to 4 ids where multi-valued."""
    generator = torch.Generator().manual_seed(1000 + step)
    lengths, values, weights = [], [], None
    for column in schema.sparse.values():
        bags = torch.randint(0, 5, (rows,), generator=generator) if column.multi else torch.ones(rows, dtype=torch.long)
        lengths.append(bags.to(torch.int32))
        values.append(torch.randint(0, column.num_ids, (int(bags.sum()),), generator=generator))
    if schema.is_weighted:  # as the loader has it: 1 where a feature has no weights
        draws = [torch.rand(len(v), generator=generator) for v in values]
        has = [c.weights is not None for c in schema.sparse.values()]
        weights = torch.cat([d if h else torch.ones_like(d) for d, h in zip(draws, has, strict=True)])
    return Batch(
        dense=torch.randn(rows, len(schema.dense), generator=generator),
        sparse=KeyedJaggedTensor(
            keys=list(schema.sparse), values=torch.cat(values), lengths=torch.cat(lengths), weights=weights
        ),
        labels=(torch.rand(rows, len(schema.labels), generator=generator) > 0.6).float(),
        weights=torch.ones(rows),
        groups={name: torch.randint(0, 3, (rows,), generator=generator) for name in schema.groups},
    )


def share(batch: Batch, rank: int, world_size: int) -> Batch:
    """The rows of a global batch that fall to one rank."""
    rows = len(batch.weights) // world_size
    low, high = rank * rows, (rank + 1) * rows
    lengths, values, weights = [], [], []
    for jagged in batch.sparse.to_dict().values():
        offsets = jagged.offsets()
        lengths.append(jagged.lengths()[low:high])
        run = slice(int(offsets[low]), int(offsets[high]))
        values.append(jagged.values()[run])
        weights += [] if jagged.weights_or_none() is None else [jagged.weights()[run]]
    return Batch(
        dense=batch.dense[low:high],
        sparse=KeyedJaggedTensor(
            keys=batch.sparse.keys(),
            values=torch.cat(values),
            lengths=torch.cat(lengths),
            weights=torch.cat(weights) if weights else None,
        ),
        labels=batch.labels[low:high],
        weights=batch.weights[low:high],
        groups={name: values[low:high] for name, values in batch.groups.items()},
    )
