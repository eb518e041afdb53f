"""Several gloo ranks on this machine, for tests."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """`fn(rank, world_size, *args)` on each rank of a gloo process group; what they return, by rank.

    Args:
        fn: a function at module level; spawned interpreters import it by name.
        args: sent by pickling.
        timeout: seconds after which ranks that still run are ended.

    Raises:
        AssertionError: with the traceback of each rank that failed, or naming those that hang.
    """
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(fn, rank, world_size, folder, args)) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait(processes, Path(folder), timeout)
        return [torch.load(f"{folder}/result{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(fn: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        init = f"file://{folder}/store"
        dist.init_process_group("gloo", init, timedelta(seconds=60), world_size, rank)
        torch.save(fn(rank, world_size, *args), f"{folder}/result{rank}.pt")
        dist.barrier()  # a rank that leaves early tears down connections that others still use
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - the parent shows it, whatever it is
        Path(f"{folder}/error{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # the other ranks may wait in a collective; a clean shutdown would wait for them


def _wait(processes: list[Any], folder: Path, timeout: float) -> None:
    end = time.monotonic() + timeout
    while any(p.is_alive() for p in processes) and time.monotonic() < end:
        if any(p.exitcode not in (None, 0) for p in processes):
            break
        time.sleep(0.02)
    time.sleep(0.5 if any(p.exitcode not in (None, 0) for p in processes) else 0)  # let the others report too
    hanging = [rank for rank, p in enumerate(processes) if p.is_alive()]
    for rank in hanging:
        processes[rank].kill()
    for process in processes:
        process.join()
    errors = [f"rank {p.stem[5:]}:\n{p.read_text()}" for p in sorted(folder.glob("error*.txt"))]
    codes = [p.exitcode for p in processes]
    summary = f"exit codes by rank {codes}; ended by this test, after at most {timeout} s: ranks {hanging}"
    assert codes == [0] * len(codes), "\n".join([summary, *errors])
