"""This loop, streaming from Parquet, against the bare TorchRec loop on batches in memory; same model, alternating.

    torchrun --nproc-per-node 2 -m scripts.bench.training --dim 64 [--sharding table_wise] [--rounds 6]

Both arms run in the same processes, a few steps each in turn, so that a machine that slows down slows both. The bare
arm is what TorchRec's own examples do: DistributedModelParallel, TrainPipelineSparseDist, nothing else. Shape: 13 dense
and 26 single-valued columns, 26 tables, DLRM with bottom 256-D and top 256-128, row-wise Adagrad.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist

from dist_rec.config import RunConfig, from_mapping
from dist_rec.job import JobData, quiet_libraries
from dist_rec.recommender import distribute
from dist_rec.training.checkpoint import Checkpointer
from dist_rec.training.report import Reporter
from dist_rec.training.runtime import Runtime, process
from dist_rec.training.trainer import Trainer
from dist_rec.training.weights import WeightRecorder
from scripts.bench.arms import Arm, alternate, finished, ratio, training

NUM_DENSE, NUM_SPARSE = 13, 26


def main() -> None:
    """Parses the arguments, makes the data, times both arms and prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each table")
    parser.add_argument("--batch", type=int, default=4096, help="rows per rank and step")
    parser.add_argument("--sharding", default="table_wise")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=40, help="steps of an arm in a round")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--decode-threads", type=int, default=1, help="a GPU can train faster than one core decodes")
    parser.add_argument("--data-rows", type=int, default=8 * 65536, help="rows in the Parquet files, per rank")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        config = from_mapping(_mapping(arguments, Path(folder)))
        with process(config.run) as runtime:
            shared = Path(runtime.broadcast(folder))
            config.data.train, config.run.dir = str(shared / "data"), str(shared / "run")
            if runtime.is_main:
                _write(shared / "data", arguments, runtime.world_size)
            dist.barrier(group=runtime.control)
            result = compare(config, runtime, arguments.rounds, arguments.steps)
            dist.barrier(group=runtime.control)
    if runtime.is_main:
        print(json.dumps({**vars(arguments), "ranks": runtime.world_size, **result}), file=sys.stdout)


def compare(config: RunConfig, runtime: Runtime, rounds: int, steps: int) -> dict[str, float]:
    """Examples/s of both arms over all rounds, their ratio, and the ratios within a round.

    Totals and not medians: reports and the assembly of blocks come every so many steps, and must count.
    """
    data = JobData(config, runtime, splits=("train",))
    memory = list(itertools.islice(data.train(None), 32))
    parts = distribute(config, runtime)
    arms = {
        "ours": finished(_ours(config, runtime, data, steps), runtime),
        "bare": training(parts.model, parts.optimizer.combined, memory, steps, runtime),
    }
    seconds = alternate(arms, runtime, rounds)
    examples = steps * config.data.batch_size * runtime.world_size * rounds
    speeds = {f"{name}_examples_per_second": round(examples / sum(taken)) for name, taken in seconds.items()}
    return {**speeds, **ratio(seconds["bare"], seconds["ours"])}


def _ours(config: RunConfig, runtime: Runtime, data: JobData, steps: int) -> Arm:
    parts, folder = distribute(config, runtime), Path(config.run.dir)
    trainer = Trainer(
        model=parts.model,
        optimizer=parts.optimizer,
        loader=data.train(None),
        validation=None,
        schema=config.schema,
        config=config.train,
        metrics=config.metrics,
        reporter=Reporter(folder, total_steps=10**9, is_main=runtime.is_main, config=config.report, stream=sys.stderr),
        weights=WeightRecorder(parts.model, config.report.weights),
        checkpointer=Checkpointer(folder / "checkpoints", config.checkpoint, runtime),
        runtime=runtime,
        total_steps=10**9,
        report_every=config.report.every,
        checkpoint_every=None,
        started=time.perf_counter(),
        facts={},
    )
    return lambda: trainer.run_to(trainer.progress.step + steps)


def _mapping(arguments: argparse.Namespace, folder: Path) -> dict:
    tables = {f"c{i}": {"num_ids": arguments.rows} for i in range(NUM_SPARSE)}
    return {
        "schema": {"labels": {"label": None}, "dense": {f"i{i}": None for i in range(NUM_DENSE)}, "sparse": tables},
        "data": {"train": str(folder), "batch_size": arguments.batch, "decode_threads": arguments.decode_threads},
        "model": {"name": "dlrm", "dim": arguments.dim, "bottom": [256], "top": [256, 128]},
        "embeddings": {"sharding": arguments.sharding},
        "optim": {"tables": {"lr": 0.01}},
        "train": {"epochs": None, "steps": 10**9, "precision": arguments.precision},
        "report": {"tensorboard": importlib.util.find_spec("tensorboard") is not None},
        "run": {"dir": str(folder / "run"), "device": arguments.device},
    }


def _write(folder: Path, arguments: argparse.Namespace, world_size: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part in range(2):
        rows = arguments.data_rows // 2 * world_size
        columns = {"label": rng.integers(0, 2, rows).astype(np.float32)}
        columns |= {f"i{i}": rng.normal(size=rows).astype(np.float32) for i in range(NUM_DENSE)}
        columns |= {f"c{i}": rng.integers(0, arguments.rows, rows) for i in range(NUM_SPARSE)}
        pq.write_table(pa.table(columns), folder / f"part-{part}.parquet", row_group_size=65536, compression="zstd")


if __name__ == "__main__":
    main()
