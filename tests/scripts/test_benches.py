"""The benches of table sets, multi-domain models and retrieval, at a size at which nothing is measured: do they run."""

from __future__ import annotations

import contextlib
import io
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_rec.config import from_mapping
from scripts.bench import multidomain, retrieval, table_sets
from tests.ranks import run_ranks
from tests.sharded import runtime

SIZES: dict[str, Any] = {"features": 3, "rows": 40, "dim": 4, "batch": 16, "rounds": 1, "steps": 1, "domains": 3}
SIZES |= {"sharding": "table_wise", "optimizer": "adagrad", "layout": "separate"}


def _table_sets(rank: int, world_size: int) -> dict[str, Any]:
    sizes = Namespace(**SIZES)
    separate, wide = (from_mapping(table_sets._mapping(sizes, 2, layout)) for layout in ("separate", "wide"))
    return table_sets.compare(separate, wide, runtime(rank, world_size), sizes)


def _multi_domain(rank: int, world_size: int) -> dict[str, Any]:
    names = [multidomain.BASE, "crocodile_2_rows32"]
    return multidomain.compare(names, runtime(rank, world_size), Namespace(**SIZES))


def test_layouts_of_table_sets() -> None:
    found, _ = run_ranks(_table_sets, 2)
    sent = {arm: sum(found[arm]["bytes_per_step"].values()) for arm in ("tables", "wide", "collections")}
    assert found["ranks"] == 2 and found["tables"]["ratio"] == 1
    assert 0 < sent["wide"] < sent["tables"]


def test_multi_domain_models() -> None:
    found, _ = run_ranks(_multi_domain, 2)
    assert list(found) == [multidomain.BASE, "crocodile_2_rows32"]
    assert all(arm["examples_per_second"] > 0 and arm["bytes_per_step"] for arm in found.values())


def test_every_arm_is_a_config() -> None:
    for name in multidomain.ARMS:
        config = from_mapping(multidomain._mapping(Namespace(**SIZES), name))
        assert ("covariance" in config.auxiliary) == (name.startswith("crocodile") and "no_covariance" not in name)


def _retrieval(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """What rank 0 prints; nothing on the others."""
    sizes = Namespace(batch=8, items=30, dim=4, rounds=1, steps=1, sharding="row_wise", loader=False)
    if rank == 0:
        retrieval._write(sizes, folder, world_size)
    torch.distributed.barrier()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        retrieval._trained(sizes, folder, runtime(rank, world_size))
    return json.loads(printed.getvalue()) if rank == 0 else {}


def test_training_of_two_towers(tmp_path: Path) -> None:
    found, _ = run_ranks(_retrieval, 2, tmp_path)
    assert all(found["examples_per_second"][arm] > 0 for arm in ("plain", "ssl", "one", "three"))
    sent = found["bytes sent per step"]
    assert 0 < sent["plain"] < sent["ssl"]


def test_searches_find_the_same() -> None:
    given = {"queries": 20, "items": 300, "width": 4, "k": 3, "batch": 8, "block": 64, "plain_mb": 1}
    given["threads"] = torch.get_num_threads()  # they are set for the whole process
    for name in retrieval.SEARCHES:
        if name == "faiss":
            pytest.importorskip("faiss", reason="faiss-cpu is not installed")
        assert retrieval._searched(name, given)["agree"] == 1
