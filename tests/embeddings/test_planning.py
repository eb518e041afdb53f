"""Plans of a job: one for all ranks, or one error for all."""

from __future__ import annotations

from typing import Any

import pytest

from dist_rec import recommender
from dist_rec.config import from_mapping
from dist_rec.embeddings.no_plan import Room, explain
from dist_rec.embeddings.sharding import PlanError
from dist_rec.embeddings.tables import Table
from dist_rec.training.optim import fuse_table_optimizer
from dist_rec.training.runtime import host_memory
from tests.ranks import run_ranks
from tests.runs import values
from tests.sharded import runtime

GIB = 1024**3


def _refused(rank: int, world_size: int, rows: int, sharding: dict[str, Any]) -> str:
    big = {"schema": {"sparse": {"user": {"num_ids": rows}}}, "sharding": sharding}
    config = from_mapping(values("no/such/data", "unused", **big))
    with pytest.raises(PlanError) as error:
        recommender.distribute(config, runtime(rank, world_size))
    return str(error.value)


def test_a_plan_that_does_not_fit_is_an_error_of_every_rank():
    first, second = run_ranks(_refused, 2, 1_000_000, {"host_memory_gb": 0.01}, timeout=100)
    assert first == second
    assert "available: 0.010 GiB per rank (sharding.host_memory_gb)" in first


def test_on_a_cpu_the_planner_counts_on_the_memory_that_this_machine_has():
    each = host_memory() // 2
    first, _ = run_ranks(_refused, 2, 4 * each // (8 * 4), {}, timeout=100)
    assert f"available: {each / GIB:.3f} GiB per rank" in first and "needed: " in first


def _broken(rank: int, world_size: int) -> str:
    config = from_mapping(values("no/such/data", "unused"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recommender, "plan_tables", lambda *args, **kwargs: 1 // 0)
        with pytest.raises((PlanError, ZeroDivisionError)) as error:
            recommender.distribute(config, runtime(rank, world_size))
    return repr(error.value)


def test_what_nobody_expects_of_the_planner_ends_the_other_ranks_too():
    first, second = run_ranks(_broken, 2, timeout=100)
    assert first.startswith("ZeroDivisionError")
    assert second.startswith('PlanError("rank 0 failed: ZeroDivisionError')


def _cures(kind: str, gib: float, ranks: int, *, count: int = 1, width: int = 64, kernel: str = "auto") -> list[str]:
    """What would fit on GPUs of 80 GiB, besides larger ones."""
    rows = int(gib * GIB) // (width * 4)
    tables = [Table(f"t{i}", (), rows, width, (), (), "sum", kind, kernel, init_bound=0.1) for i in range(count)]
    kinds = {t.name: kind for t in tables}
    said = explain("too large", tables, kinds, Room(ranks, min(ranks, 8), 80 * GIB, "cuda", None))
    *cures, last = said.split("what would fit: ")[1].split("; or ")
    if kernel == "fused":
        assert "fused_uvm_caching" in last
        *cures, last = cures
    assert last == "a larger sharding.device_memory_gb if the machine has it"
    return cures


def test_what_is_said_to_fit_is_only_what_could():
    # a table that stays whole does not fit on any number of ranks
    assert _cures("table_wise", 100, 4) == ["sharding row_wise for t0"]
    assert _cures("table_wise", 100, 1) == ["sharding row_wise for t0 on at least 2 ranks"]
    assert _cures("column_wise", 100, 4) == ["sharding row_wise for t0"]  # 64 columns are one shard
    assert _cures("column_wise", 800, 4, width=2048)[0] == "at least 15 ranks"
    assert _cures("table_row_wise", 1000, 8) == ["sharding row_wise for t0 on at least 19 ranks"]
    # replicas are as large on any number of them
    assert _cures("data_parallel", 100, 4) == ["sharding row_wise for t0"]
    assert _cures("data_parallel", 60, 4, count=2) == ["sharding row_wise for all tables"]
    # many that are whole can be spread
    assert _cures("table_wise", 25, 1, count=4)[0] == "at least 2 ranks"
    # what may be split by rows already is not told to be
    assert _cures("auto", 1000, 4, kernel="fused") == _cures("row_wise", 1000, 4) == ["at least 19 ranks"]
    assert _cures("row_wise", 50, 4) == []


@pytest.mark.parametrize("kind", ["table_wise", "data_parallel"])
def test_a_table_that_more_ranks_do_not_help_fits_by_rows(kind):
    def plan(kind: str, ranks: int) -> None:
        user = {"schema": {"sparse": {"user": {"num_ids": 400_000_000}}}}  # 12 GiB
        tables = {"embeddings": {"tables": {"user": {"sharding": kind}}}, "sharding": {"host_memory_gb": 10}}
        config = from_mapping(values("no/such/data", "unused", **user, **tables))
        model, made = recommender.build(config)
        fuse_table_optimizer(model.embeddings.collection.parameters(), config.optim.tables)
        recommender.plan_tables(config, model, made, "cpu", ranks, ranks)

    for ranks in (4, 16):
        with pytest.raises(PlanError, match="what would fit: sharding row_wise for main_user; or a larger"):
            plan(kind, ranks)
    plan("row_wise", 4)
