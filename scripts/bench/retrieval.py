"""Two towers: the cost of the contrastive loss and of three look-ups in place of one; exact search against others.

    torchrun --nproc-per-node 2 -m scripts.bench.retrieval train [--batch 1024] [--rounds 6]
    python -m scripts.bench.retrieval search [--queries 10000] [--items 1000000] [--width 64] [--k 50]

train: arms alternate in the same processes, on batches in memory as the loader makes them. "plain" and "ssl" are the
framework's pipelined step without and with the contrastive loss, whose two views are further keys of the one look-up.
"one" and "three" are the same step not pipelined: with one look-up, and with one for the rows and one for each view,
whose gradients all go through one backward. --loader measures what making views costs the loader's thread.

search: every arm in a process of its own, as much memory as it asks for: seconds, those of the CPU (which neighbours
disturb less), and the peak of the process above what it had before the search. "exact" is `metrics/topk.py`, which
evaluation and predict use; "plain" multiplies as many queries with all items as fit --plain-mb and calls torch.topk;
"faiss" is IndexFlatIP.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dist_rec.config import RunConfig, from_mapping
from dist_rec.data.bags import empty, packed, unpacked
from dist_rec.data.batch import Batch
from dist_rec.data.views import feature_of, view_key
from dist_rec.job import JobData, quiet_libraries
from dist_rec.metrics.topk import exact_topk
from dist_rec.recommender import distribute
from dist_rec.training.runtime import RunSettings, Runtime, keep_freed_memory, process
from scripts.bench.arms import MEMORY, Arm, alternate, exchanged, finished, ratio, training

VIEWS = ("contrastive_1", "contrastive_2")


def main() -> None:
    """Parses the arguments and runs one of the benches; prints JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    train = kinds.add_parser("train")
    train.add_argument("--batch", type=int, default=1024, help="rows per rank and step")
    train.add_argument("--items", type=int, default=100_000)
    train.add_argument("--dim", type=int, default=64)
    train.add_argument("--rounds", type=int, default=6)
    train.add_argument("--steps", type=int, default=10, help="steps of an arm in a round")
    train.add_argument("--sharding", default="row_wise")
    train.add_argument("--loader", action="store_true", help="batches/s of the loader instead")
    search = kinds.add_parser("search")
    search.add_argument("--queries", type=int, default=10_000)
    search.add_argument("--items", type=int, default=1_000_000)
    search.add_argument("--width", type=int, default=64)
    search.add_argument("--k", type=int, default=50)
    search.add_argument("--batch", type=int, default=1024, help="queries at a time")
    search.add_argument("--block", type=int, default=8192, help="items at a time")
    search.add_argument("--plain-mb", type=int, default=1024, help="megabytes of scores of the plain arm")
    search.add_argument("--threads", type=int, default=1)
    search.add_argument("--arms", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.kind == "search":
        for name in arguments.arms:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(json.dumps(pool.apply(_searched, (name, vars(arguments)))), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder, process(RunSettings()) as runtime:
        shared = Path(runtime.broadcast(folder))
        if runtime.is_main:
            _write(arguments, shared, runtime.world_size)
        torch.distributed.barrier(group=runtime.control)
        (_loaded if arguments.loader else _trained)(arguments, shared, runtime)
        torch.distributed.barrier(group=runtime.control)


# train


def _mapping(arguments: argparse.Namespace, folder: Path, ssl: bool) -> dict[str, Any]:
    items = {"num_ids": arguments.items, "table": "items"}
    return {
        "schema": {
            "labels": {},
            "items": {"feature": "item"},
            "sparse": {
                "user": {"num_ids": arguments.items},
                "history": {**items, "multi": True, "mean_length": 10},
                "item": items,
                "brand": {"num_ids": 5000, "join": "item"},
                "words": {"num_ids": 50_000, "multi": True, "mean_length": 6, "join": "item"},
            },
        },
        "data": {"train": f"{folder}/train", "items": f"{folder}/items.parquet", "cache": f"{folder}/cache",
                 "batch_size": arguments.batch},
        "model": {"name": "two_tower", "dim": arguments.dim, "layers": [256, 64]},
        "objective": {"name": "in_batch_softmax"},
        "auxiliary": {"contrastive": {"masking": "rfm"}} if ssl else {},
        "embeddings": {"sharding": arguments.sharding},
        "train": {"epochs": None, "steps": 1},
        "run": {"dir": f"{folder}/run"},
    }  # fmt: skip


def _write(arguments: argparse.Namespace, folder: Path, ranks: int) -> None:
    rng, rows = np.random.default_rng(0), MEMORY * arguments.batch * ranks
    (folder / "train").mkdir()
    lists = [rng.integers(0, arguments.items, 10).tolist() for _ in range(rows)]
    columns = {name: rng.integers(0, arguments.items, rows) for name in ("user", "item")}
    pq.write_table(pa.table({**columns, "history": lists}), folder / "train" / "a.parquet", row_group_size=16384)
    words = [rng.integers(0, 50_000, 6).tolist() for _ in range(arguments.items)]
    brands = rng.integers(0, 5000, arguments.items)
    pq.write_table(
        pa.table({"item": np.arange(arguments.items), "brand": brands, "words": words}), folder / "items.parquet"
    )


def _batches(config: RunConfig, runtime: Runtime) -> list[Batch]:
    loader = JobData(config, runtime, splits=("train",)).train(None)
    batches = list(islice(loader, MEMORY))
    loader.close()
    return batches


def _trained(arguments: argparse.Namespace, folder: Path, runtime: Runtime) -> None:
    configs = {name: from_mapping(_mapping(arguments, folder, name != "plain")) for name in ("plain", "ssl")}
    batches = {name: _batches(config, runtime) for name, config in configs.items()}
    arms: dict[str, Arm] = {}
    for name, config in configs.items():
        parts = distribute(config, runtime)
        arms[name] = training(parts.model, parts.optimizer, batches[name], arguments.steps, runtime)
    for name, split in (("one", _whole), ("three", _apart)):
        arms[name] = _unpipelined(configs["ssl"], [split(b) for b in batches["ssl"]], arguments.steps, runtime)
    seconds = alternate(arms, runtime, arguments.rounds)
    sent = {name: exchanged(arm) for name, arm in arms.items()} if runtime.world_size > 1 else {}
    if runtime.is_main:
        examples = arguments.rounds * arguments.steps * arguments.batch * runtime.world_size
        pace = {name: round(examples / sum(times)) for name, times in seconds.items()}
        print(json.dumps({
            **vars(arguments), "ranks": runtime.world_size, "examples_per_second": pace,
            "ssl over plain": ratio(seconds["plain"], seconds["ssl"]),
            "one look-up over three": ratio(seconds["three"], seconds["one"]),
            "bytes sent per step": {n: round(sum(s.values()) / arguments.steps) for n, s in sent.items()},
        }))  # fmt: skip


def _whole(batch: Batch) -> list[Batch]:
    return [batch]


def _apart(batch: Batch) -> list[Batch]:
    """The rows with empty views, then each view with everything else empty."""
    bags, parts = unpacked(batch.sparse), []
    size = len(batch.weights)
    for wanted in ("", *VIEWS):
        mine = {key for key in bags if key == (view_key(feature_of(key), wanted) if wanted else feature_of(key))}
        here = {key: b if key in mine else empty(size) for key, b in bags.items()}
        sparse = packed(here, batch.sparse.values().numpy().dtype, False)
        parts.append(Batch(batch.dense, sparse, batch.labels, batch.weights, batch.groups, batch.view_dense))
    return parts


def _unpipelined(config: RunConfig, batches: list[list[Batch]], steps: int, runtime: Runtime) -> Arm:
    parts = distribute(config, runtime)
    root: Any = parts.model.module
    root = getattr(root, "module", root)  # under DistributedDataParallel
    stream: Iterator[list[Batch]] = cycle(batches)
    parts.model.train()

    def run() -> None:
        for _ in range(steps):
            pieces = next(stream)
            parts.optimizer.zero_grad()
            tables: dict[str, Tensor] = {}
            for piece, wanted in zip(pieces, ("", *VIEWS), strict=False):
                found = root.embeddings(piece.sparse)
                mine = found if len(pieces) == 1 else {n: t for n, t in found.items() if n.partition("#")[2] == wanted}
                tables |= {name: tensor + 0 for name, tensor in mine.items()}  # waits for the exchange
            loss, _ = root.dense(pieces[0], tables)
            loss.backward()
            parts.optimizer.step()

    return finished(run, runtime)


def _loaded(arguments: argparse.Namespace, folder: Path, runtime: Runtime) -> None:
    for name in ("plain", "ssl"):
        config = from_mapping(_mapping(arguments, folder, name != "plain"))
        loader = JobData(config, runtime, splits=("train",)).train(None)
        stream = iter(loader)
        list(islice(stream, 10))
        started = time.perf_counter()
        list(islice(stream, 200))
        pace = 200 * arguments.batch / (time.perf_counter() - started)
        loader.close()
        print(json.dumps({"loader": name, "rank": runtime.rank, "rows_per_second": round(pace)}), flush=True)


# search


def _exact(queries: Tensor, vectors: Tensor, given: dict[str, Any]) -> np.ndarray:
    parts = (exact_topk(q, vectors, given["k"], block=given["block"]).rows for q in queries.split(given["batch"]))
    return torch.cat(list(parts)).numpy()


def _plain(queries: Tensor, vectors: Tensor, given: dict[str, Any]) -> np.ndarray:
    size = max(1, given["plain_mb"] * 2**20 // (4 * len(vectors)))
    return torch.cat([(q @ vectors.T).topk(given["k"], dim=1).indices for q in queries.split(size)]).numpy()


def _faiss(queries: Tensor, vectors: Tensor, given: dict[str, Any]) -> np.ndarray:
    import faiss

    faiss.omp_set_num_threads(given["threads"])
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors.numpy())  # a copy: that is how an index holds vectors
    return index.search(queries.numpy(), given["k"])[1]


SEARCHES = {"exact": _exact, "plain": _plain, "faiss": _faiss}


def _searched(name: str, given: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(given["threads"])
    keep_freed_memory()  # as in every process of the framework
    generator = torch.Generator().manual_seed(0)
    shapes = ((given["items"], given["width"]), (given["queries"], given["width"]))
    vectors, queries = (torch.randn(s, generator=generator) for s in shapes)
    for matrix in (vectors, queries):
        matrix /= matrix.norm(dim=1, keepdim=True)  # in place: a copy here would hide the search's own peak
    run = partial(SEARCHES[name], given=given)
    run(queries[:2], vectors[:1000])  # libraries loaded
    with open("/proc/self/status") as status:
        now = int(next(line for line in status if line.startswith("VmRSS")).split()[1])
    started, worked = time.perf_counter(), time.process_time()
    found = run(queries, vectors)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    some = queries[:64]
    agree = float(np.mean(found[:64] == (some @ vectors.T).topk(given["k"], dim=1).indices.numpy()))
    found_out = {
        "search": name,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_mb_above": round((peak - now) / 1024),
        "agree": agree,
    }
    return found_out | {k: given[k] for k in ("queries", "items", "width", "k", "threads")}


if __name__ == "__main__":
    main()
