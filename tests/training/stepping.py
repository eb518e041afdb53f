"""Some training steps on the batches of `examples.global_batch`, for tests that compare what they did to parameters."""

from __future__ import annotations

from typing import Any

import torch

from dist_rec.config import from_mapping
from dist_rec.recommender import distribute
from dist_rec.training.trainer import GuardedPipeline
from tests.examples import global_batch, share
from tests.sharded import runtime, whole

STEPS, ROWS = 5, 12


def updates(rank: int, world_size: int, runs: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Per run: name -> what STEPS steps on ROWS rows of all ranks together added to the tensor. For `run_ranks`."""
    found = []
    for run in runs:
        config = from_mapping(run)
        parts = distribute(config, runtime(rank, world_size))
        before = whole(parts.model.state_dict())
        pipeline = GuardedPipeline(parts.model, parts.optimizer, runtime(rank, world_size))
        batches = iter([share(global_batch(config.schema, s, ROWS), rank, world_size) for s in range(STEPS)])
        parts.model.train()
        for _ in range(STEPS):
            pipeline.progress(batches)
        after = whole(parts.model.state_dict())
        found.append({name: after[name] - before[name] for name in before})
    return found
