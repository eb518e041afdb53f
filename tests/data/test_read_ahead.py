"""Threads that read ahead: they give way to training where they may, and whatever fails in them is an error."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from dist_rec.data.footers import read_footers
from dist_rec.data.loader import DataConfig, Loader
from dist_rec.data.read_ahead import yield_to_training
from dist_rec.data.schema import LabelColumn, Schema, SparseColumn
from tests.runs import ITEMS, write

SECONDS = 20  # that nobody waits if all is well

linux = pytest.mark.skipif(sys.platform != "linux", reason="a thread has no niceness of its own")


@linux
@pytest.mark.parametrize(("current", "wanted"), [(0, 10), (10, 10), (19, 19)])
def test_a_process_that_is_nicer_already_stays_so(monkeypatch, current, wanted):
    asked = []
    monkeypatch.setattr(os, "getpriority", lambda kind, who: current)
    monkeypatch.setattr(os, "setpriority", lambda kind, who, value: asked.append((kind, who, value)))
    yield_to_training()
    assert asked == [(os.PRIO_PROCESS, threading.get_native_id(), wanted)]


@linux
def test_where_no_priority_may_be_set_rows_are_read_all_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "setpriority", _refuse)
    assert _consumed(tmp_path) == [6]


def _refuse(kind: int, who: int, value: int) -> None:
    raise PermissionError(13, "Permission denied")


def _broken() -> None:
    raise ZeroDivisionError("of the thread")


def test_a_thread_that_cannot_begin_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("dist_rec.data.loader.yield_to_training", _broken)
    assert _consumed(tmp_path) == ["of the thread"]


def _consumed(folder: Path) -> list[int | str]:
    """The number of batches of 16 in 90 rows, or the error that ended them; nothing if the consumer hangs."""
    data = str(write(folder / "data", 90))
    schema = Schema(labels={"click": LabelColumn()}, sparse={"item": SparseColumn(ITEMS)})
    config = DataConfig(train=data, batch_size=16)
    loader = Loader(
        config, schema, read_footers(data), rank=0, world_size=1, batch_size=16, seed=0, shuffle=True, epochs=1
    )
    said: list[int | str] = []

    def consume() -> None:
        try:
            said.append(len(list(loader)))
        except ZeroDivisionError as error:
            said.append(str(error))

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(SECONDS)
    return said
