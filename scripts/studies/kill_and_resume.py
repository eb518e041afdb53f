#!/usr/bin/env python
"""Ends one rank of a real job with kill -9 at a random moment and goes on: which rows were lost, which were repeated?

    scripts/studies/kill_and_resume.py [--rounds 5] [--seed 1] [--work FOLDER]

Each round trains two epochs of 4,000 shuffled rows with torchrun on 1, 2 or 3 ranks, with a checkpoint every few steps,
kills a random rank after a random step, and resumes on 1, 2 or 3 ranks until the end. Each row has an id of its own,
which the window of the training metrics keeps and the checkpoints carry: the last checkpoint tells which rows the final
weights have seen. Resumed on the same number of ranks, its bytes must also be those of a run that nobody disturbed.
Prints a table and ends with 1 if any round was not as it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from dist_rec.training.checkpoint import Checkpoint, find

ROWS, EPOCHS, BATCH = 4000, 2, 16
TIMEOUT = 300  # seconds for one job


class Round(NamedTuple):
    """What happened. exit_code: of the killed job. same_bytes: as an undisturbed run's; None where there is none."""

    ranks: int
    killed_rank: int
    killed_after_step: int
    exit_code: int
    continued_from: int
    continued_on: int
    missing: int
    repeated: int
    same_bytes: bool | None

    @property
    def is_good(self) -> bool:
        """Whether the job failed when it was killed, and went on without losing or repeating a row."""
        lost = self.missing or self.repeated
        return bool(self.exit_code and self.continued_from) and not lost and self.same_bytes is not False


def write_data(folder: Path) -> Path:
    """Rows in two files of uneven row groups, each with an id of its own."""
    rng = np.random.default_rng(5)
    table = pa.table(
        {
            "click": rng.integers(0, 2, ROWS).astype("float32"),
            "d0": rng.normal(size=ROWS).astype("float32"),
            "user": rng.integers(0, 203, ROWS),
            "item": rng.integers(0, 101, ROWS),
            "tags": [rng.integers(0, 57, n).tolist() for n in rng.integers(0, 4, ROWS)],
            "row": np.arange(ROWS),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.slice(0, 2700), folder / "a.parquet", row_group_size=370)
    pq.write_table(table.slice(2700), folder / "b.parquet", row_group_size=370)
    return folder


def write_card(data: Path) -> Path:
    """The config of every job."""
    config = {
        "schema": {
            "labels": {"click": None},
            "dense": {"d0": None},
            "sparse": {"user": {"num_ids": 203}, "item": {"num_ids": 101}, "tags": {"num_ids": 57, "multi": True}},
            "groups": {"row": {"column": "row"}},
        },
        "data": {"train": str(data), "batch_size": BATCH, "shuffle_rows": 500},
        "model": {"name": "dlrm", "dim": 8, "bottom": [16], "top": [16], "dropout": 0.2},
        "embeddings": {"tables": {"user": {"sharding": "row_wise"}, "tags": {"sharding": "data_parallel"}}},
        "run": {"device": "cpu"},
        "train": {"epochs": EPOCHS},
        "metrics": {"grouped_auc": ["row"], "window_rows": 9 * EPOCHS * ROWS},  # every row, even all on one rank
        "checkpoint": {"every": 7},
        "report": {"every": 1, "tensorboard": False},
    }
    card = data / "card.yaml"
    card.write_text(yaml.safe_dump(config))
    return card


def start(card: Path, run: Path, ranks: int) -> subprocess.Popen[bytes]:
    """A job of `ranks` processes, which writes its output next to the run folder."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    with open(run.with_suffix(".log"), "ab") as log:
        command = [*torchrun, "-m", "dist_rec.train", str(card), f"run.dir={run}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def finish(card: Path, run: Path, ranks: int) -> None:
    """A job that runs to its end."""
    code = start(card, run, ranks).wait(TIMEOUT)
    if code:
        raise RuntimeError(f"exit code {code}:\n{run.with_suffix('.log').read_text()[-3000:]}")


def reported_step(run: Path) -> int:
    """The last step in metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def processes_of(launcher: int) -> Iterator[tuple[int, int]]:
    """(rank, process id) of the ranks that a launcher has started."""
    for process in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        try:
            parent = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
            environment = Path(f"/proc/{process}/environ").read_bytes().split(b"\0") if parent == launcher else []
        except OSError:  # it ended meanwhile
            continue
        for entry in environment:
            if entry.startswith(b"RANK="):
                yield int(entry[5:]), process


def kill_a_rank(job: subprocess.Popen[bytes], run: Path, after_step: int, rank: int, delay: float) -> int:
    """Kills `rank` some seconds after `after_step` was reported; returns the step that the run had reached."""
    end = time.monotonic() + TIMEOUT
    while reported_step(run) < after_step:
        if job.poll() is not None or time.monotonic() > end:
            job.kill()
            raise RuntimeError(
                f"the job did not reach step {after_step}:\n{run.with_suffix('.log').read_text()[-3000:]}"
            )
        time.sleep(0.002)
    time.sleep(delay)
    os.kill(dict(processes_of(job.pid))[rank], signal.SIGKILL)
    return reported_step(run)


def rows_seen(checkpoint: Checkpoint) -> Counter[int]:
    """Row -> how often the weights of a checkpoint were trained on it."""
    states = [torch.load(path, weights_only=True)["own"]["window"] for path in checkpoint.path.glob("rank-*.pt")]
    # rows that only pad a batch have weight 0, the last of the stored values
    return Counter(int(row) for s in states for row in s["group.row"][s["values"][:, -1] > 0])


def one_round(
    card: Path, run: Path, draw: random.Random, ranks: int, continued_on: int, undisturbed: Path | None
) -> Round:
    """Trains on `ranks`, kills, and goes on on `continued_on`. undisturbed: run folder to compare bytes with."""
    steps = EPOCHS * -(-ROWS // (ranks * BATCH))
    killed_rank = draw.randrange(ranks)
    job = start(card, run, ranks)
    step = kill_a_rank(job, run, draw.randrange(8, steps * 3 // 4), killed_rank, delay=draw.random() * 0.03)
    exit_code = job.wait(TIMEOUT)
    found = find(run / "checkpoints")
    finish(card, run, continued_on)
    last = find(run / "checkpoints")[-1]
    rows = rows_seen(last)
    return Round(
        ranks=ranks,
        killed_rank=killed_rank,
        killed_after_step=step,
        exit_code=exit_code,
        continued_from=found[-1].step if found else 0,
        continued_on=continued_on,
        missing=sum(max(EPOCHS - rows[row], 0) for row in range(ROWS)),
        repeated=sum(max(count - EPOCHS, 0) for count in rows.values()),
        same_bytes=None if undisturbed is None else _bytes(last) == _bytes(find(undisturbed / "checkpoints")[-1]),
    )


def _bytes(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint.path.glob("*.distcp")}


def _study(work: Path, rounds: int, seed: int) -> bool:
    card = write_card(write_data(work / "data"))
    draw, good = random.Random(seed), True
    print(f"{ROWS:,} rows, {EPOCHS} epochs, {BATCH} rows per rank and step, a checkpoint every 7 steps\n")
    titles = ("round", "ranks", "killed", "after step", "exit code", "resumed from", "on ranks", "missing", "repeated",
              "bytes as undisturbed")  # fmt: skip
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    for number in range(1, rounds + 1):
        ranks, continued_on = draw.choice((1, 2, 3)), (2, 3, 1)[number % 3]
        if number == 1:
            ranks = continued_on  # one round at least can be compared
        undisturbed = None
        if ranks == continued_on:
            undisturbed = work / f"undisturbed-{ranks}"
            if not undisturbed.exists():
                finish(card, undisturbed, ranks)
        r = one_round(card, work / f"round-{number}", draw, ranks, continued_on, undisturbed)
        same = {None: "-", True: "same", False: "DIFFERENT"}[r.same_bytes]
        cells = (number, r.ranks, f"rank {r.killed_rank}", r.killed_after_step, r.exit_code, r.continued_from,
                 r.continued_on, r.missing, r.repeated, same)  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        good = good and r.is_good
    return good


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="an empty folder; default: a temporary one")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        raise SystemExit(0 if _study(chosen.work or Path(folder), chosen.rounds, chosen.seed) else 1)


if __name__ == "__main__":
    main()
