"""Layouts of M table sets on the same features: a table for each set, one wide table, and M separate collections.

    torchrun --nproc-per-node 2 -m scripts.bench.table_sets [--sets 2 5] [--optimizer adagrad] [--rounds 8]

Whole training steps of ME-MMoE with small experts on batches in memory, all arms in the same processes in turn. For
every M: examples/s of each layout, and the bytes that rank 0 puts into collectives in a step, counted. Separate
collections are what M independent models would have; they exist in this file only.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec import recommender
from dist_rec.config import RunConfig, from_mapping
from dist_rec.embeddings import sharding
from dist_rec.embeddings.stage import EmbeddingStage
from dist_rec.job import quiet_libraries
from dist_rec.training.optim import StepOptimizer, fuse_table_optimizer
from dist_rec.training.runtime import Runtime, process
from scripts.bench.arms import MEMORY, alternate, exchanged, random_batch, ratio, training

DOMAINS = 5


def main() -> None:
    """Parses the arguments, times the arms and prints a JSON line for every M."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", type=int, default=[2, 5])
    parser.add_argument("--features", type=int, default=12)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each table")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2048, help="rows per rank and step")
    parser.add_argument("--sharding", default="table_wise")
    parser.add_argument("--optimizer", default="adagrad")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15, help="steps of an arm in a round")
    arguments = parser.parse_args()
    quiet_libraries()
    settings = [from_mapping(_mapping(arguments, m, layout)) for m in arguments.sets for layout in ("separate", "wide")]
    with process(settings[0].run) as runtime:
        for separate, wide in zip(settings[::2], settings[1::2], strict=True):
            result = compare(separate, wide, runtime, arguments)
            if runtime.is_main:
                print(json.dumps({**vars(arguments), "sets": separate.model.num_experts, **result}), flush=True)


def compare(separate: RunConfig, wide: RunConfig, runtime: Runtime, arguments: argparse.Namespace) -> dict[str, Any]:
    """Examples/s and bytes per step of every layout, and how many times faster than the first each is."""
    batches = [random_batch(separate, runtime.rank * MEMORY + i) for i in range(MEMORY)]
    arms, one_step = {}, {}
    for name, config in (("tables", separate), ("wide", wide), ("collections", separate)):
        if name == "collections":
            model, optimizer = _collections(config, runtime)
        else:
            parts = recommender.distribute(config, runtime)
            model, optimizer = parts.model, parts.optimizer
        arms[name] = training(model, optimizer.combined, batches, arguments.steps, runtime)
        one_step[name] = exchanged(arms[name])
    seconds = alternate(arms, runtime, arguments.rounds)
    examples = arguments.steps * arguments.batch * runtime.world_size * arguments.rounds
    return {
        "ranks": runtime.world_size,
        **{
            name: {
                "examples_per_second": round(examples / sum(taken)),
                **ratio(seconds["tables"], taken),
                "bytes_per_step": {k: round(v / arguments.steps) for k, v in one_step[name].items()},
            }
            for name, taken in seconds.items()
        },
    }


class _Stages(nn.Module):
    """A collection for each table set."""

    def __init__(self, stages: list[EmbeddingStage], names: list[str]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.names = names

    def forward(self, sparse: KeyedJaggedTensor) -> dict[str, Tensor]:
        return {name: stage(sparse)[name] for name, stage in zip(self.names, self.stages, strict=True)}


def _collections(config: RunConfig, runtime: Runtime) -> tuple[nn.Module, StepOptimizer]:
    """As `recommender.distribute` makes them, with a collection of its own for each table set."""
    model, tables = recommender.build(config)
    sets = config.model.table_sets(config.schema)
    stages = [
        EmbeddingStage(
            [t for t in tables if t.blocks[0].table_set == s.name],
            [s],
            is_weighted=False,
            project=config.embeddings.project,
            train_projection=config.embeddings.train_projection,
            device=torch.device("meta"),
        )
        for s in sets
    ]
    model.embeddings = _Stages(stages, [s.name for s in sets])  # type: ignore[assignment]
    for stage in stages:
        fuse_table_optimizer(stage.collection.parameters(), config.optim.tables)
    plan = recommender.plan_together(config, model, tables, runtime)
    sharded = sharding.shard(
        model, plan, runtime.device, runtime.group, tables=tables, seed=config.run.seed, threads=runtime.cores
    )
    return sharded, StepOptimizer(sharded, config.optim)


def _mapping(arguments: argparse.Namespace, sets: int, layout: str) -> dict[str, Any]:
    tables = {f"c{i}": {"num_ids": arguments.rows} for i in range(arguments.features)}
    return {
        "schema": {
            "labels": {"label": None},
            "sparse": tables,
            "groups": {"domain": {"column": "domain", "num_ids": DOMAINS}},
        },
        "data": {"train": "none", "batch_size": arguments.batch},
        "model": {"name": "me_mmoe", "dim": arguments.dim, "num_experts": sets, "experts": [32], "towers": []},
        "embeddings": {"sharding": arguments.sharding, "layout": layout},
        "optim": {"tables": {"name": arguments.optimizer}},
        "run": {"device": "cpu"},
    }


if __name__ == "__main__":
    main()
