"""Rows per second of `dist-rec prepare criteo` against reading the same text with pyarrow alone, and memory by rows.

Writes files of the format of Criteo's train.txt with random ids, one four times as long as the other, and prepares
both, each in a process of its own: its peak memory must not grow with the rows. (It does with distinct ids; those of
the longer file repeat.) Reading alone is one pass; prepare makes two and writes.

    python scripts/bench/prepare.py --rows 500000
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ARM = """
import json, resource, sys, time
from pathlib import Path
from dist_rec.data import prepared
from dist_rec.data.raw import criteo
raw, out = map(Path, sys.argv[2:])
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
if sys.argv[1] == "prepare":
    prepared.prepare(criteo.open_log(raw), out)
else:
    assert sum(rows.batch.num_rows for rows in criteo._read(raw / "train.txt"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": time.perf_counter() - started, "before": before / 1024, "peak": peak / 1024}))
"""


def write(path: Path, rows: int) -> None:
    """Random rows; ids of a column are frequent and rare ones, a column has up to some 100,000."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(0, rows, 5000):
            dense = rng.integers(0, 500, (5000, 13)).tolist()
            sparse = (rng.zipf(1.3, (5000, 26)) % 100_000 * 40_503).tolist()
            file.writelines(
                f"{i % 4 // 3}\t" + "\t".join(map(str, d)) + "\t" + "\t".join(f"{v:08x}" for v in s) + "\n"
                for i, (d, s) in enumerate(zip(dense, sparse, strict=True))
            )


def repeat(source: Path, target: Path, times: int) -> None:
    """`target`: `source` several times; never held whole, as a child's peak memory begins at that of its parent."""
    with target.open("wb") as out:
        for _ in range(times):
            with source.open("rb") as file:
                shutil.copyfileobj(file, out)


def run(arm: str, raw: Path) -> dict[str, float]:
    """Seconds and MiB of one arm, in a process of its own."""
    out = raw / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", ARM, arm, str(raw), str(out)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints a line per file and arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000, help="of the shorter file")
    rows = parser.parse_args().rows // 5000 * 5000
    with tempfile.TemporaryDirectory() as name:
        for times in (1, 4):
            raw = Path(name) / str(times)
            raw.mkdir()
            if times == 1:
                write(raw / "train.txt", rows)
            else:
                repeat(Path(name) / "1" / "train.txt", raw / "train.txt", times)
            found = {arm: run(arm, raw) for arm in ("read", "prepare")}
            for arm, result in found.items():
                pace = times * rows / result["seconds"]
                memory = f"{result['peak']:,.0f} MiB at its peak, {result['before']:,.0f} before"
                print(f"{times * rows:>12,} rows  {arm:<8}{pace:>10,.0f} rows/s  {memory}")
            print(
                f"{'':>12}       prepare takes {found['prepare']['seconds'] / found['read']['seconds']:.1f} x reading"
            )


if __name__ == "__main__":
    main()
