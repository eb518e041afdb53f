"""Several gloo ranks on this machine, for tests.

The ranks are processes that stay alive between calls: a fresh interpreter would spend seconds on importing torchrec.
Each call has a process group of its own, and begins with the environment, the folder and the import path of the caller
and with the random numbers and default settings of a new process. What a test changes in the modules it imported stays.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

START_SECONDS = 120  # for an interpreter to start and import torch
REPORT_SECONDS = 0.5  # after the first failure, for the other ranks to fail too and say why


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 300) -> list[Any]:
    """`fn(rank, world_size, *args)` on each rank of a gloo process group; what they return, by rank.

    What the ranks print is printed here when they are done, with the rank in front where there are several.

    Args:
        fn: a function at module level; the ranks import it by name.
        args: sent by pickling.
        timeout: seconds after which ranks that still run are ended.

    Raises:
        AssertionError: with the traceback of each rank that failed, or naming those that hang. All processes are then
            ended, and the next call starts fresh ones.
    """
    workers = _pool(world_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # pickled before anything is sent, so that what cannot be sent fails here and not on half of the ranks
        tasks = [pickle.dumps((fn, rank, world_size, name, args)) for rank in range(world_size)]
        surroundings = dict(os.environ), os.getcwd(), list(sys.path)
        for worker, task in zip(workers, tasks, strict=True):
            worker.begin((task, *surroundings))
        try:
            _wait(workers, timeout)
        except BaseException:
            _end_pool()
            raise
        finally:
            _print_output(folder, world_size)
        return [torch.load(folder / f"result{rank}.pt", weights_only=False) for rank in range(world_size)]


@dataclass
class _Worker:
    """One process of the pool, as the caller sees it. exitcode: None while it works on a task."""

    process: Any
    channel: connection.Connection
    exitcode: int | None = 0
    error: str = ""
    ready: bool = False

    @classmethod
    def start(cls) -> _Worker:
        context = mp.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the channel
        return cls(process, ours)

    def begin(self, task: tuple) -> None:
        self.exitcode, self.error = None, ""
        self.channel.send(task)

    def read(self) -> None:
        """Takes note of what the process has to say; call when its channel or its sentinel is ready."""
        try:
            self.error = self.channel.recv()
            self.exitcode = 1 if self.error else 0
        except (EOFError, ConnectionResetError):  # it ended without a word
            self.process.join()
            self.exitcode = self.process.exitcode


_workers: list[_Worker] = []


def _pool(size: int) -> list[_Worker]:
    """`size` idle processes."""
    if any(not worker.process.is_alive() for worker in _workers):
        _end_pool()
    _workers.extend(_Worker.start() for _ in range(size - len(_workers)))
    for worker in _workers[:size]:
        if not worker.ready:
            assert worker.channel.poll(START_SECONDS), f"a process of the pool did not start in {START_SECONDS} s"
            worker.read()
            assert worker.exitcode == 0, f"a process of the pool did not start: exit code {worker.exitcode}"
            worker.ready = True
    return _workers[:size]


def _end_pool() -> None:
    for worker in _workers:
        worker.process.kill()
    for worker in _workers:
        worker.process.join()
        worker.channel.close()
    _workers.clear()


atexit.register(_end_pool)


def _wait(workers: list[_Worker], timeout: float) -> None:
    end = time.monotonic() + timeout
    while busy := [w for w in workers if w.exitcode is None]:
        if any(w.exitcode for w in workers):
            end = min(end, time.monotonic() + REPORT_SECONDS)
        ready = connection.wait([w.channel for w in busy], max(end - time.monotonic(), 0))
        if not ready:
            break
        for worker in busy:
            if worker.channel in ready:
                worker.read()
    hanging = [rank for rank, w in enumerate(workers) if w.exitcode is None]
    codes = [w.exitcode for w in workers]
    errors = [f"rank {rank}:\n{w.error}" for rank, w in enumerate(workers) if w.error]
    summary = f"exit codes by rank {codes}; ended by this test, after at most {timeout} s: ranks {hanging}"
    assert codes == [0] * len(codes), "\n".join([summary, *errors])


def _print_output(folder: Path, world_size: int) -> None:
    for kind, stream in (("out", sys.stdout), ("err", sys.stderr)):
        for rank in range(world_size):
            path = folder / f"rank{rank}.{kind}"
            prefix = f"[rank {rank}] " if world_size > 1 else ""
            for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
                print(f"{prefix}{line}", file=stream)


# What follows runs in the processes of the pool.


def _serve(channel: connection.Connection) -> None:
    channel.send("")
    fresh = _random_state()
    while True:
        try:
            task, environment, folder, path = channel.recv()
        except EOFError:  # the caller is gone
            return
        error = ""
        try:
            sys.path[:] = path
            os.chdir(folder)
            with _like_a_new_process(environment, fresh):
                _run(*pickle.loads(task))
        except BaseException:  # noqa: BLE001 - the caller shows it, whatever it is
            error = traceback.format_exc()
        channel.send(error)


def _run(fn: Callable[..., Any], rank: int, world_size: int, folder: str, args: tuple) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ.update({name: str(value) for name, value in here.items()})
    with _output_to(Path(folder), rank):
        dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), world_size, rank)
        torch.save(fn(rank, world_size, *args), f"{folder}/result{rank}.pt")
        dist.barrier()  # a rank that leaves early tears down connections that others still use
        dist.destroy_process_group()


_GLOBALS = {
    ("torchrec.distributed.comm", "_INTRA_PG"): None,
    ("torchrec.distributed.comm", "_CROSS_PG"): None,
    ("torchrec.distributed.collective_utils", "_INITIALIZED"): False,
}
"""What torchrec remembers about the first process group of a process: later ones would skip a collective, or hang."""


@contextmanager
def _like_a_new_process(environment: dict[str, str], fresh: tuple) -> Iterator[None]:
    os.environ.clear()
    os.environ.update(environment)
    _set_random_state(fresh)
    for (module, name), value in _GLOBALS.items():
        if module in sys.modules and hasattr(sys.modules[module], name):
            setattr(sys.modules[module], name, value)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in ("", "dist_rec", "torchrec")}
    with warnings.catch_warnings():
        yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    gc.collect()  # the models of this call, which are full of circles


def _random_state() -> tuple:
    return torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002 - libraries use it


def _set_random_state(state: tuple) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    random.setstate(state[2])


@contextmanager
def _output_to(folder: Path, rank: int) -> Iterator[None]:
    """Sends what this process and its children print to files, also what compiled code prints."""
    streams = {1: sys.stdout, 2: sys.stderr}
    saved = {number: os.dup(number) for number in streams}
    for number, kind in ((1, "out"), (2, "err")):
        with open(folder / f"rank{rank}.{kind}", "wb") as file:
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, stream in streams.items():
            stream.flush()
            os.dup2(saved[number], number)
            os.close(saved[number])
