"""What the benches share: arms that take turns in the same processes, and the bytes that ranks exchange."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.config import RunConfig
from dist_rec.data.batch import Batch
from dist_rec.training.runtime import Runtime

MEMORY = 16  # batches that an arm goes round in

Arm = Callable[[], None]
"""Some steps of one of the things that are compared."""

_BYTES = {"float": 4, "int": 4, "long int": 8, "double": 8, "c10::BFloat16": 2, "bool": 1, "unsigned char": 1}


def alternate(arms: Mapping[str, Arm], runtime: Runtime, rounds: int) -> dict[str, list[float]]:
    """Seconds of every arm in each round, after one round that does not count. Collective.

    A few steps each in turn, every other round in reverse: a machine that slows down slows all of them.
    """
    for arm in arms.values():
        arm()
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in arms if turn % 2 else reversed(list(arms)):
            dist.barrier(group=runtime.control)
            start = time.perf_counter()
            arms[name]()
            dist.barrier(group=runtime.control)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def training(
    model: DistributedModelParallel, optimizer: KeyedOptimizer, batches: Sequence[Batch], steps: int, runtime: Runtime
) -> Arm:
    """An arm that trains `steps` steps on batches in memory with TorchRec's own pipeline, and waits for the device."""
    pipeline = TrainPipelineSparseDist(model, optimizer, runtime.device, execute_all_batches=True)
    endless: Iterator[Batch] = itertools.cycle(batches)
    model.train()

    def run() -> None:
        for _ in range(steps):
            pipeline.progress(endless)

    return finished(run, runtime)


def finished(arm: Arm, runtime: Runtime) -> Arm:
    """The arm, and the wait for what it has left on the device."""

    def run() -> None:
        arm()
        if runtime.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def exchanged(arm: Arm) -> dict[str, int]:
    """Kind of collective -> bytes that this rank put into them during the arm, its own share of the result included.

    Counted by the profiler's record of gloo, DistributedDataParallel's own collectives among them; CPU only. TorchRec's
    reduce-scatter is an all-reduce on gloo.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        arm()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    counts: Counter[str] = Counter()
    for event in events:
        if str(event["name"]).startswith("gloo:") and "Input Dims" in event.get("args", {}):
            arguments = event["args"]
            for dims, kind in zip(arguments["Input Dims"], arguments["Input type"], strict=True):
                counts[event["name"].removeprefix("gloo:")] += math.prod(dims) * _BYTES.get(kind, 0)
    return dict(counts)


def ratio(base: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """How many times faster `other` is than `base`: of all rounds together, and the extremes of a round."""
    ratios = [b / o for b, o in zip(base, other, strict=True)]
    whole = sum(base) / sum(other)
    return {"ratio": round(whole, 3), "ratio_min": round(min(ratios), 3), "ratio_max": round(max(ratios), 3)}


def random_batch(config: RunConfig, number: int) -> Batch:
    """Batch `number` of a function of (config, number): single-valued features, uniform ids."""
    generator = torch.Generator().manual_seed(number)
    rows, sparse = config.data.batch_size, config.schema.sparse
    values = [torch.randint(0, c.num_ids, (rows,), generator=generator, dtype=torch.int32) for c in sparse.values()]
    lengths = torch.ones(len(values) * rows, dtype=torch.int32)
    return Batch(
        dense=torch.randn(rows, len(config.schema.dense), generator=generator),
        sparse=KeyedJaggedTensor(keys=list(sparse), values=torch.cat(values), lengths=lengths),
        labels=torch.randint(0, 2, (rows, 1), generator=generator).float(),
        weights=torch.ones(rows),
        groups={
            name: torch.randint(0, c.num_values or 1, (rows,), generator=generator)
            for name, c in config.schema.groups.items()
        },
    )
