"""The benches of table sets and multi-domain models, at a size at which nothing is measured: do they run."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from dist_rec.config import from_mapping
from scripts.bench import multidomain, table_sets
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
