"""Rows per second of `Loader` against decoding the same Parquet file alone, on one core.

The rounds alternate between the arms, and ratios are of arms of the same round: other load moves both.

    python scripts/bench/loader.py --rounds 7
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dist_rec.data.footers import check_columns, read_footers
from dist_rec.data.loader import DataConfig, Loader
from dist_rec.data.schema import DenseColumn, LabelColumn, Schema, SparseColumn
from dist_rec.training.runtime import keep_freed_memory

NUM_DENSE, NUM_SPARSE, NUM_IDS = 13, 26, 10_000_000


def write(folder: Path, rows: int, row_group_rows: int) -> None:
    """A Criteo-shaped file: 13 float32, 26 int64, one label."""
    rng = np.random.default_rng(0)
    columns = {"label": rng.integers(0, 2, rows).astype(np.float32)}
    columns |= {f"d{i}": rng.lognormal(size=rows).astype(np.float32) for i in range(NUM_DENSE)}
    # squared uniforms: frequent and rare ids, as dictionary pages and plain pages of real logs
    columns |= {f"s{i}": (rng.random(rows) ** 4 * NUM_IDS).astype(np.int64) for i in range(NUM_SPARSE)}
    pq.write_table(pa.table(columns), folder / "part.parquet", row_group_size=row_group_rows)


def schema() -> Schema:
    """The schema of `write`'s file; log1p and standardised dense columns, as usual."""
    return Schema(
        labels={"label": LabelColumn()},
        sparse={f"s{i}": SparseColumn(num_ids=NUM_IDS) for i in range(NUM_SPARSE)},
        dense={f"d{i}": DenseColumn(transform="log1p", mean=0.8, std=0.5) for i in range(NUM_DENSE)},
    )


def decode(folder: Path) -> int:
    """Reads all row groups and nothing else."""
    file = pq.ParquetFile(folder / "part.parquet")
    columns = schema().columns()
    return sum(file.read_row_group(i, columns, use_threads=False).num_rows for i in range(file.num_row_groups))


def loader(folder: Path, shuffle: bool, batch_size: int, epochs: int | None = 1) -> Loader:
    """A loader over the file."""
    footers = read_footers(str(folder))
    check_columns(footers, schema())
    return Loader(DataConfig(str(folder), batch_size), schema(), footers, rank=0, world_size=1, batch_size=batch_size,
                  seed=0, shuffle=shuffle, epochs=epochs)  # fmt: skip


def load(folder: Path, shuffle: bool, batch_size: int) -> int:
    """Runs through one epoch of batches."""
    return batch_size * sum(1 for _ in loader(folder, shuffle, batch_size))


def wait(folder: Path, batch_size: int, step_seconds: float, steps: int) -> tuple[float, float]:
    """(share of the time that a consumer with such steps waits for batches, the longest wait in seconds)."""
    batches = loader(folder, True, batch_size, epochs=None)
    iterator = iter(batches)
    next(iterator)
    first = before = batches.wait_seconds
    began, longest = time.perf_counter(), 0.0
    for _ in range(steps):
        time.sleep(step_seconds)
        next(iterator)
        longest, before = max(longest, batches.wait_seconds - before), batches.wait_seconds
    batches.close()
    return (before - first) / (time.perf_counter() - began), longest


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--row-group-rows", type=int, default=4 * 65536)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    keep_freed_memory()  # as in training
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, args.rows, args.row_group_rows)
        arms: dict[str, Callable[[], int]] = {
            "decode alone": lambda: decode(folder),
            "loader, no shuffle": lambda: load(folder, False, args.batch_size),
            "loader, shuffle": lambda: load(folder, True, args.batch_size),
        }
        report(arms, args.rows, args.rounds)
        share, longest = wait(folder, 512, 0.004, 1500)
        print(f"a consumer with 512 rows per 4 ms waits {share:.2%} of its time, {longest * 1e3:.0f} ms at the most")


def report(arms: dict[str, Callable[[], int]], rows: int, rounds: int) -> None:
    """Runs the arms in turn, after one round that does not count; the first arm is what the others are held against."""
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for i in range(rounds + 1):
        for name, arm in arms.items():
            began = time.perf_counter()
            arm()
            if i:
                rates[name].append(rows / (time.perf_counter() - began))
    base = next(iter(rates.values()))
    print(f"{'arm':20s} {'M rows/s':>9s} {'ratio':>6s}  same-round ratios")
    for name, values in rates.items():
        ratios = sorted(value / other for value, other in zip(values, base, strict=True))
        spread = f"{ratios[0]:.2f} .. {ratios[-1]:.2f}"
        print(f"{name:20s} {statistics.median(values) / 1e6:9.2f} {statistics.median(ratios):6.2f}  {spread}")


if __name__ == "__main__":
    main()
