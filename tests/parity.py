"""Sharded against unsharded training: the same global batches through the framework on any number of ranks and through
plain torch, and the relative difference of what every parameter was changed by.

Updates are compared, not parameters: a wrong factor on a small gradient moves a parameter by less than any tolerance.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed import comm
from torchrec.optim import RowWiseAdagrad

from dist_rec.config import RunConfig
from dist_rec.data.batch import Batch
from dist_rec.data.schema import Schema
from dist_rec.embeddings.sharding import initialise, sharding_types
from dist_rec.recommender import Distributed, build, distribute
from dist_rec.training.trainer import GuardedPipeline
from tests.examples import global_batch, share
from tests.sharded import runtime, whole

STEPS, ROWS = 6, 12  # global rows of a step: they divide by 1, 2, 3 and 4 ranks


def _batch(schema: Schema, step: int) -> Batch:
    return global_batch(schema, step, ROWS)


class Training(NamedTuple):
    """What some steps did: a loss for each, and every tensor of the model's state before and after; for sharded ones
    also the plan, and the names of the sharded modules that are pipelined and of all of them."""

    losses: list[float]
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    plan: dict[str, str]
    pipelined: tuple[list[str], list[str]]


def unsharded(config: RunConfig, steps: int = STEPS, batch: Callable[[Schema, int], Batch] = _batch) -> Training:
    """Plain torch on the whole batches. batch: (schema, step) -> the rows of all ranks."""
    model, tables = build(config, table_device="cpu")
    initialise(model.state_dict(), tables, config.run.seed, projection_init=config.embeddings.projection_init)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = [p for n, p in model.named_parameters() if ".embedding_bags." not in n and p.requires_grad]
    kinds = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad}
    rule = config.optim.tables
    extra = {} if rule.name == "sgd" else {"eps": rule.eps}
    optimizers = [
        kinds[rule.name](model.embeddings.collection.parameters(), lr=rule.lr, **extra),
        torch.optim.SGD(dense, lr=config.optim.dense.lr),
    ]
    losses = []
    for step in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, _ = model(batch(config.schema, step))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return Training(losses, before, {name: value.clone() for name, value in model.state_dict().items()}, {}, ([], []))


def sharded(
    rank: int,
    world_size: int,
    configs: list[RunConfig],
    steps: int = STEPS,
    prepare: Callable[[Distributed], None] | None = None,
    batch: Callable[[Schema, int], Batch] = _batch,
    ranks_per_node: int | None = None,
) -> list[Training]:
    """Each config as the framework trains it, pipelined; for `run_ranks`. prepare: changes a model before it starts.
    batch: (schema, step) -> the rows of all ranks. ranks_per_node: as if on several nodes; by default all on one."""
    results = []
    here = runtime(rank, world_size)
    if ranks_per_node is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(ranks_per_node)  # TorchRec reads it
        here = replace(here, local_world_size=ranks_per_node)
    for config in configs:
        parts = distribute(config, here)
        if prepare is not None:
            prepare(parts)
        before = whole(parts.model.state_dict())
        if ranks_per_node is not None:
            assert comm._INTRA_PG.size() == ranks_per_node
        pipeline = GuardedPipeline(parts.model, parts.optimizer, here)
        batches = iter([share(batch(config.schema, s), rank, world_size) for s in range(steps)])
        losses = []
        for _ in range(steps):
            loss = torch.stack(list(pipeline.progress(batches).losses.values())).sum()
            dist.all_reduce(loss)
            losses.append(loss.item() / world_size)
        plan = sharding_types(parts.plan)
        results.append(Training(losses, before, whole(parts.model.state_dict()), plan, pipeline.pipelined()))
    return results


def update_errors(found: Training, expected: Training) -> dict[str, float]:
    """Tensor of the state -> norm of the difference of the two updates, relative to the expected update.

    Both must have started alike, and all of it must have changed.
    """
    assert found.before.keys() == expected.before.keys()
    errors = {}
    for name, start in expected.before.items():
        assert torch.equal(found.before[name], start), f"initial {name}"
        update, right = ((t.after[name] - start).double() for t in (found, expected))
        assert right.norm() > 0, f"{name} did not train"
        errors[name] = ((update - right).norm() / right.norm()).item()
    return errors
