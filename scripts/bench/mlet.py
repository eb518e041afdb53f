"""Two-layer tables against plain ones: examples/s and bytes sent per step, all arms alternating in the same processes.

    torchrun --nproc-per-node 2 -m scripts.bench.mlet [--widths 64,16 128,16 128,8] [--sharding row_wise] [--rounds 7]

Arms for each (k, d): plain d and plain k (single layers), after and before (k inside, d served; projected behind and
before the exchange). The step is the framework's own, pipelined, on batches in memory: 20 single-valued features, ids
uniform in tables of 100,000 rows; 13 dense columns; DLRM as the authors' prototype has it (bottom 512-256-64-d, top
512-256); row-wise Adagrad.

sent: bytes that a rank hands to the kernel for its sockets in a step, as /proc/self/io counts them (gloo). vectors:
of these looked-up vectors and their gradients, counted at the collectives that TorchRec calls (see `traffic.py`). The
rest of `sent` is ids, the all-reduce of dense gradients, and what gloo's reduce-scatter sends beyond a ring's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.config import RunConfig, from_mapping
from dist_rec.data.batch import Batch
from dist_rec.job import quiet_libraries
from dist_rec.recommender import distribute
from dist_rec.training.runtime import Runtime, process
from dist_rec.training.trainer import GuardedPipeline
from scripts.bench.traffic import calls, written

NUM_DENSE, NUM_SPARSE, BATCHES = 13, 20, 8
ARMS = ("plain d", "plain k", "after", "before")


def main() -> None:
    """Parses the arguments, times the arms for each pair of widths and prints a table and JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", nargs="+", default=["64,16", "128,16", "128,8"], help="pairs k,d")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each table")
    parser.add_argument("--batch", type=int, default=4096, help="rows per rank and step")
    parser.add_argument("--sharding", default="row_wise")
    parser.add_argument("--bottom", nargs="+", type=int, default=[512, 256, 64])
    parser.add_argument("--top", nargs="+", type=int, default=[512, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps of an arm in a round")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    quiet_libraries()
    results = []
    with process(_config(arguments, "plain d", 8, 8).run) as runtime:
        for text in arguments.widths:
            k, d = map(int, text.split(","))
            results.append({"k": k, "d": d, **compare(arguments, k, d, runtime)})
    if runtime.is_main:
        print("\n".join(_table(results)))
        print(json.dumps({**vars(arguments), "ranks": runtime.world_size, "results": results}))


def compare(arguments: argparse.Namespace, k: int, d: int, runtime: Runtime) -> dict[str, Any]:
    """Per arm: examples/s (median over rounds), bytes per step, and the median ratio to plain d within a round."""
    batches = [_batch(arguments, runtime.rank * BATCHES + i) for i in range(BATCHES)]
    arms = {name: _arm(_config(arguments, name, k, d), batches, runtime) for name in arguments.arms}
    traffic = {name: _traffic(arm, runtime) for name, arm in arms.items()}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(arguments.rounds):
        for name in arms if turn % 2 else reversed(list(arms)):
            dist.barrier(group=runtime.control)
            start = time.perf_counter()
            for _ in range(arguments.steps):
                arms[name]()
            if runtime.device.type == "cuda":
                torch.cuda.synchronize()
            dist.barrier(group=runtime.control)
            seconds[name].append(time.perf_counter() - start)
    examples = arguments.steps * arguments.batch * runtime.world_size
    first = seconds[arguments.arms[0]]
    return {
        name: {
            "examples_per_second": round(examples / median(times)),
            f"ratio to {arguments.arms[0]}": _ratios(first, times),
            **({"ratio to after": _ratios(seconds["after"], times)} if "after" in seconds else {}),
            **traffic[name],
        }
        for name, times in seconds.items()
    }


def _ratios(base: list[float], times: list[float]) -> list[float]:
    """Median, least and largest ratio within a round."""
    ratios = [b / t for b, t in zip(base, times, strict=True)]
    return [round(x, 3) for x in (median(ratios), min(ratios), max(ratios))]


def _arm(config: RunConfig, batches: list[Batch], runtime: Runtime) -> Callable[[], None]:
    parts = distribute(config, runtime)
    pipeline = GuardedPipeline(parts.model, parts.optimizer, runtime)
    stream: Iterator[Batch] = itertools.cycle(batches)
    parts.model.train()

    def step() -> None:
        pipeline.progress(stream)

    for _ in range(3):
        step()
    inside, every = pipeline.pipelined()
    assert inside == every, "a sharded module is not pipelined"
    return step


def _traffic(step: Callable[[], None], runtime: Runtime, steps: int = 4) -> dict[str, int]:
    """Bytes per step of this rank, see the module's text."""
    with calls() as made:
        before = written()
        for _ in range(steps):
            step()
        sent = written() - before
    dist.barrier(group=runtime.control)
    return {"sent": round(sent / steps), "vectors": round(sum(c.sent for c in made if c.is_float) / steps)}


def _config(arguments: argparse.Namespace, arm: str, k: int, d: int) -> RunConfig:
    layers = {} if arm.startswith("plain") else {"inner_dim": k, "project": arm}
    sparse = {f"c{i}": {"num_ids": arguments.rows} for i in range(NUM_SPARSE)}
    return from_mapping(
        {
            "schema": {"labels": {"label": None}, "dense": {f"i{i}": None for i in range(NUM_DENSE)}, "sparse": sparse},
            "data": {"train": "none", "batch_size": arguments.batch},
            "model": {"name": "dlrm", "dim": k if arm == "plain k" else d, "bottom": arguments.bottom,
                      "top": arguments.top},
            "embeddings": {"sharding": arguments.sharding, **layers},
            "run": {"device": arguments.device},
        }
    )  # fmt: skip


def _batch(arguments: argparse.Namespace, number: int) -> Batch:
    rows, generator = arguments.batch, torch.Generator().manual_seed(number)
    return Batch(
        dense=torch.randn(rows, NUM_DENSE, generator=generator),
        sparse=KeyedJaggedTensor(
            keys=[f"c{i}" for i in range(NUM_SPARSE)],
            values=torch.randint(0, arguments.rows, (rows * NUM_SPARSE,), generator=generator, dtype=torch.int32),
            lengths=torch.ones(rows * NUM_SPARSE, dtype=torch.int32),
        ),
        labels=torch.randint(0, 2, (rows, 1), generator=generator).float(),
        weights=torch.ones(rows),
    )


def _table(results: list[dict[str, Any]]) -> Iterator[str]:
    for result in results:
        yield f"k = {result['k']}, d = {result['d']}"
        for name in ARMS:
            if name in result:
                yield f"  {name:8} " + "  ".join(f"{key} {value}" for key, value in result[name].items())


if __name__ == "__main__":
    main()
