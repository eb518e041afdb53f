"""Plans of a job: one for all ranks, or one error for all."""

from __future__ import annotations

from typing import Any

import pytest

from dist_rec import recommender
from dist_rec.config import from_mapping
from dist_rec.embeddings.sharding import PlanError
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
