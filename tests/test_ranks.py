"""The pool of ranks: what one call leaves behind must not reach the next, and every failure must reach the test."""

from __future__ import annotations

import os
import random
import signal
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks


def _summed(rank: int, world_size: int, number: int) -> tuple[int, int, list[int]]:
    value = torch.tensor([rank + number])
    dist.all_reduce(value)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return os.getpid(), int(value), [int(os.environ[name]) for name in names]


def test_processes_are_used_again_and_each_call_has_its_own_group():
    first = run_ranks(_summed, 2, 10)
    assert [r[1:] for r in first] == [(21, [0, 0, 2, 2]), (21, [1, 1, 2, 2])]
    again = run_ranks(_summed, 3, 1)
    assert [r[1] for r in again] == [6, 6, 6]
    assert [r[0] for r in again[:2]] == [r[0] for r in first]
    assert os.getpid() not in [r[0] for r in again]


def _draw_and_disturb(rank: int, world_size: int) -> tuple:
    drawn = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002
    seen = os.environ.get("LEFT_BEHIND"), torch.get_default_dtype(), torch.is_grad_enabled(), os.getcwd()
    os.environ["LEFT_BEHIND"] = "by the call before"
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    os.chdir("/")
    return drawn, seen, os.environ.get("OF_THE_CALLER")


def test_nothing_is_left_for_the_next_call(monkeypatch):
    one = run_ranks(_draw_and_disturb, 1)
    monkeypatch.setenv("OF_THE_CALLER", "x")
    two = run_ranks(_draw_and_disturb, 1)
    assert one[0][:2] == two[0][:2]
    assert two[0][1] == (None, torch.float32, True, os.getcwd())
    assert (one[0][2], two[0][2]) == (None, "x")


def _fail(rank: int, world_size: int, how: str) -> None:
    if rank == 1:
        print("rank 1 says goodbye")
        if how == "raises":
            raise RuntimeError("what went wrong")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exits":
            sys.exit(7)
        time.sleep(1000)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"(?s)ranks \[0\].*rank 1:.*in _fail.*RuntimeError: what went wrong"),
        ("is killed", r"exit codes by rank \[(1|None), -9\]"),
        ("exits", r"(?s)rank 1:.*SystemExit: 7"),
        ("hangs", r"exit codes by rank \[None, None\]; .* after at most 2 s: ranks \[0, 1\]"),
    ],
)
def test_a_failure_names_the_rank_and_ends_all_processes(how, message, capsys):
    before = [r[0] for r in run_ranks(_summed, 2, 1)]
    with pytest.raises(AssertionError, match=message):
        run_ranks(_fail, 2, how, timeout=2 if how == "hangs" else 60)
    if how == "raises":
        assert "[rank 1] rank 1 says goodbye" in capsys.readouterr().out
    for pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_what_cannot_be_sent_or_returned_says_so():
    with pytest.raises(AttributeError, match="local"):
        run_ranks(lambda rank, world_size: None, 1)
    with pytest.raises(AssertionError, match=r"rank 0:(?s:.*)pickle"):
        run_ranks(_returns_a_generator, 1)


def _returns_a_generator(rank: int, world_size: int):
    return (i for i in range(3))


def _print(rank: int, world_size: int) -> None:
    print("python's")
    os.system("echo a child process")
    print("to stderr", file=sys.stderr)


def test_output_reaches_the_test(capsys):
    run_ranks(_print, 1)
    got = capsys.readouterr()
    assert sorted(got.out.splitlines()) == ["a child process", "python's"]
    assert "to stderr" in got.err
    run_ranks(_print, 2)
    assert "[rank 1] python's" in capsys.readouterr().out
