"""Threads between disk and trainer: row groups decoded ahead, and a bounded channel of ready things.

All threads are daemons and every wait ends when the channel or the pool is closed, so that stopping early never hangs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")

_CHUNK = 4  # items


class Closed(Exception):
    """The channel or the pool was closed while somebody waited on it."""


class Channel(Generic[T]):
    """A first-in first-out queue of at most `size` items from one thread to another, with an end and with errors.

    Items change threads by a few at a time: waking a reader that is as fast as the writer for each single item cost
    0.1 ms per batch.
    """

    def __init__(self, size: int) -> None:
        self._items: deque[T] = deque()
        self._size = size
        self._chunk = min(max(size // 2, 1), _CHUNK)
        self._held: list[T] = []  # the writer's own, not yet seen by the reader
        self._changed = threading.Condition()
        self._closed = False
        self._ended = False
        self._error: BaseException | None = None

    def put(self, item: T) -> None:
        """Adds an item, which the reader sees at the latest at the next `flush`; Closed if the reader has closed."""
        self._held.append(item)
        if len(self._held) == self._chunk:
            self.flush()

    def flush(self) -> None:
        """Shows the reader all items put so far; waits for room. Closed if the reader has closed the channel."""
        with self._changed:
            while len(self._items) + len(self._held) > self._size and not self._closed:
                self._changed.wait()
            if self._closed:
                raise Closed
            self._items.extend(self._held)
            self._held.clear()
            self._changed.notify_all()

    def check(self) -> None:
        """Raises Closed if the reader has closed the channel, for writers with long work between two items."""
        if self._closed:
            raise Closed

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will come; `error` is raised in the reader, after the items before it."""
        self.flush()
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def get(self) -> tuple[T | None, float]:
        """(the next item, None at the end; seconds waited for it). Raises the writer's error, or Closed."""
        with self._changed:
            seconds = self._wait()
            if self._closed:
                raise Closed
            if self._items:
                item = self._items.popleft()
                if len(self._items) <= self._size - self._chunk:
                    self._changed.notify_all()
                return item, seconds
            if self._error is not None:
                raise self._error
            return None, seconds

    def _wait(self) -> float:
        """Seconds until there is something to say to the reader."""
        if self._items or self._ended or self._closed:
            return 0.0
        began = time.perf_counter()
        while not (self._items or self._ended or self._closed):
            self._changed.wait()
        return time.perf_counter() - began

    def close(self) -> None:
        """Wakes both sides and drops what is queued."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


_JOIN_SECONDS = 4.0
_NICENESS = 10


def yield_to_training() -> None:
    """Gives the calling thread what the machine's other threads leave of the CPU.

    Reading runs ahead and can wait; a rank that loses its core to it for a moment makes all other ranks wait.
    """
    if sys.platform != "linux":  # the only system where a thread has a niceness of its own
        return
    thread = threading.get_native_id()
    # a process started with a higher niceness keeps it: lowering one takes privileges. Where a sandbox refuses even
    # this, reading with the trainer's priority costs pace, not reading at all would cost the run
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, thread, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


class DaemonPool:
    """Threads that run calls in the order submitted. Unlike `ThreadPoolExecutor`'s they never delay the exit."""

    def __init__(self, threads: int, name: str) -> None:
        self._calls: SimpleQueue[tuple[Future, Callable] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"{name}-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """The result of `call` or its error, as a future."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def close(self) -> None:
        """Ends the threads after the calls that are running; calls that have not begun must be cancelled first.

        Waits for them, but not for ever: a thread inside pyarrow while the interpreter ends would abort the process.
        """
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(_JOIN_SECONDS)

    def _work(self) -> None:
        yield_to_training()
        while (item := self._calls.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 - handed to whoever asks for the result
                    future.set_exception(error)
            del item, future, call  # an idle thread must not keep a row group alive


class RowGroupCache(Generic[T]):
    """Row groups in memory: the last one asked for and the next `ahead` of the plan, being decoded or ready.

    plan: the row groups in the order in which they will mostly be asked for; an order that differs costs time only.
    """

    def __init__(self, plan: Sequence[int], decode: Callable[[int], T], pool: DaemonPool, ahead: int) -> None:
        self._plan = list(dict.fromkeys(plan))
        self._place = {group: i for i, group in enumerate(self._plan)}
        self._decode = decode
        self._pool = pool
        self._ahead = ahead
        self._at = 0
        self._decoded: dict[int, Future[T]] = {}

    def get(self, group: int) -> T:
        """The decoded row group, at once if it was read ahead. Raises what decoding it raised."""
        self._at = max(self._at, self._place[group])
        wanted = dict.fromkeys([group, *self._plan[self._at : self._at + 1 + self._ahead]])
        for old in [g for g in self._decoded if g not in wanted]:
            self._decoded.pop(old).cancel()
        for new in wanted:
            if new not in self._decoded:
                self._decoded[new] = self._pool.submit(partial(self._decode, new))
        return self._decoded[group].result()

    def close(self) -> None:
        """Forgets everything and cancels what has not begun."""
        for future in self._decoded.values():
            future.cancel()
        self._decoded.clear()
