"""What C2AL's heads cost in training, and what the baselines of its study cost: examples/s and memory.

    torchrun --nproc-per-node 2 -m scripts.bench.c2al [--model dhen] [--arms heads heads_64 pcgrad] [--rounds 20]

Whole training steps of the framework (pipelined, guarded, with its optimiser step) on batches in memory, all arms in
the same processes in turn, against the model without heads. ratio_median is that of the rounds, cpu_ratio that of rank
0's CPU time, which neighbours on the machine disturb less. "plain_again" is the plain model a second time: how far its
ratio is from 1 is how far any ratio can be trusted. Memory is counted, not sampled: `saved`, bytes that a step keeps
for backward outside the tables; `held`, bytes of parameters and optimiser state outside the tables; on a GPU also
`peak`, the bytes that a step allocates at most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dist_rec.config import RunConfig, from_mapping
from dist_rec.data.batch import Batch
from dist_rec.job import quiet_libraries
from dist_rec.recommender import Distributed, distribute
from dist_rec.training.runtime import Runtime, process
from dist_rec.training.trainer import GuardedPipeline
from scripts.bench.arms import MEMORY, Arm, alternate, finished, random_batch, ratio

PLAIN, SEGMENTS = "plain", 20
COHORTS = {
    "axes": ["segment"],
    "edges": {"segment": None},
    "head": {"segment": SEGMENTS - 1},
    "tail": {"segment": 0},
    "head_rate": 0.025,
    "tail_rate": 0.025,
    "head_mass": 0.05,
    "tail_mass": 0.05,
}
MODELS: dict[str, dict[str, Any]] = {
    "dlrm": {"name": "dlrm", "bottom": [256], "top": [256, 128]},
    "dcn": {"name": "dcn", "cross_layers": 2, "rank": 64, "deep": [256, 128]},
    "dhen": {"name": "dhen", "layers": [["attention_fm", "dot"], ["attention_fm", "linear"]], "top": [256, 128]},
}
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "plain_again": {},
    "heads": {"auxiliary": {"c2al": {"cohorts": COHORTS}}},
    "heads_64": {"auxiliary": {"c2al": {"cohorts": COHORTS, "hidden": [64]}}},
    "reweighted": {"objective": {"name": "reweighted", "cohorts": COHORTS}},
    "group_dro": {"objective": {"name": "group_dro", "cohorts": COHORTS}},
    "pcgrad": {"objective": {"name": "pcgrad", "cohorts": COHORTS}},
}


def main() -> None:
    """Parses the arguments, times the arms and prints a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="dhen")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["plain_again", "heads", "heads_64", "pcgrad"])
    parser.add_argument("--features", type=int, default=26)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each table")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4096, help="rows per rank and step")
    parser.add_argument("--sharding", default="table_wise")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="steps of an arm in a round")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    quiet_libraries()
    with process(from_mapping(_mapping(arguments, PLAIN)).run) as runtime:
        results = compare(list(dict.fromkeys([PLAIN, *arguments.arms])), runtime, arguments)
        if runtime.is_main:
            for name, result in results.items():
                facts = {"arm": name, "model": arguments.model, "ranks": runtime.world_size}
                print(json.dumps({**facts, **result}), flush=True)


def compare(names: list[str], runtime: Runtime, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of each arm: examples/s, how many times as fast as plain, and its memory."""
    arms, memory = {}, {}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        config = from_mapping(_mapping(arguments, name))
        batches = [random_batch(config, runtime.rank * MEMORY + i) for i in range(MEMORY)]
        parts = distribute(config, runtime)
        arms[name] = _training(parts, batches, arguments.steps, runtime, cpu[name])
        memory[name] = {**_memory(parts, config, batches[0], runtime), **_peak(arms[name], runtime)}
    seconds = alternate(arms, runtime, arguments.rounds)
    examples = arguments.steps * arguments.batch * runtime.world_size * arguments.rounds
    results = {}
    for name, taken in seconds.items():
        by_round = [base / own for base, own in zip(seconds[PLAIN], taken, strict=True)]
        times = [sum(cpu[n][-arguments.rounds :]) for n in (PLAIN, name)]  # without the round that does not count
        results[name] = {
            "examples_per_second": round(examples / sum(taken)),
            **ratio(seconds[PLAIN], taken),
            "ratio_median": round(median(by_round), 3),
            "cpu_ratio": round(times[0] / times[1], 3),
            **memory[name],
        }
    return results


def _training(parts: Distributed, batches: list[Batch], steps: int, runtime: Runtime, cpu: list[float]) -> Arm:
    """Trains some steps; notes the CPU seconds of this process in `cpu`."""
    pipeline = GuardedPipeline(parts.model, parts.optimizer, runtime)
    endless: Iterator[Batch] = itertools.cycle(batches)
    parts.model.train()

    def run() -> None:
        start = time.process_time()
        for _ in range(steps):
            pipeline.progress(endless)
        cpu.append(time.process_time() - start)

    return finished(run, runtime)


def _memory(parts: Distributed, config: RunConfig, batch: Batch, runtime: Runtime) -> dict[str, int]:
    """Bytes that the dense part saves for backward in a step, each storage once, and those it holds between steps."""
    dense = next(module for name, module in parts.model.named_modules() if name.split(".")[-1] == "dense")
    tables = {
        s.name: torch.zeros(len(batch.weights), len(s.features), s.dim, device=runtime.device, requires_grad=True)
        for s in config.model.table_sets(config.schema)
    }
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        dense(batch.to(runtime.device), tables)
    parameters = dict(dense.named_parameters())
    # Adagrad has one number for each
    return {"saved": sum(saved.values()), "held": sum(2 * p.nbytes for p in parameters.values())}


def _peak(arm: Arm, runtime: Runtime) -> dict[str, int]:
    if runtime.device.type != "cuda":
        return {}
    arm()
    before = torch.cuda.memory_allocated(runtime.device)
    torch.cuda.reset_peak_memory_stats(runtime.device)
    arm()
    return {"peak": torch.cuda.max_memory_allocated(runtime.device) - before}


def _mapping(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    return {
        "schema": {
            "labels": {"label": None},
            "dense": {f"i{i}": None for i in range(13)},
            "sparse": {f"c{i}": {"num_ids": arguments.rows} for i in range(arguments.features)},
            "groups": {"segment": {"column": "segment", "num_ids": SEGMENTS}},
        },
        "data": {"train": "none", "batch_size": arguments.batch},
        "embeddings": {"sharding": arguments.sharding},
        "train": {"precision": arguments.precision},
        "run": {"device": arguments.device},
        "model": {"dim": arguments.dim, **MODELS[arguments.model]},
        **ARMS[name],
    }


if __name__ == "__main__":
    main()
