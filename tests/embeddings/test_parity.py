"""Sharded equals unsharded: losses, and updates of every parameter, for every sharding, optimiser and pooling.

Updates are compared, not parameters: a wrong factor on a small gradient moves a parameter by less than any tolerance.
"""

from __future__ import annotations

import pytest

from dist_rec.config import RunConfig
from dist_rec.data.batch import Batch
from tests.examples import config, global_batch
from tests.ranks import run_ranks
from tests.sharded import Training, assert_same_training, train_sharded, train_unsharded

STEPS, ROWS = 6, 12
KINDS = ["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]
MIXED = {"user": "row_wise", "items": "table_wise", "tags": "column_wise", "hour": "data_parallel"}
MIXED_ROWS = {"user": "row_wise", "items": "table_row_wise", "tags": "table_wise", "hour": "data_parallel"}


def _config(sharding: str | dict[str, str], pooling: str, optimizer: str, project: str | None = None) -> RunConfig:
    per_table = sharding if isinstance(sharding, dict) else dict.fromkeys(MIXED, sharding)
    return config(
        embeddings={
            "pooling": pooling,
            "tables": {t: {"sharding": s} for t, s in per_table.items()},
            # "hour" has too few rows to be factored and stays a plain table beside the two-layer ones
            **({"inner_dim": 16, "project": project} if project else {}),
        },
        sharding={"min_columns": 4},
        optim={"tables": {"name": optimizer, "lr": 0.1}, "dense": {"name": "sgd", "lr": 0.1}},
        model={"name": "dlrm", "dim": 8, "bottom": [16], "top": [16]},
    )


def _batches(settings: RunConfig) -> list[Batch]:
    return [global_batch(settings.schema, step, ROWS) for step in range(STEPS)]


def _sharded(rank: int, world_size: int, cases: list[tuple]) -> list[Training]:
    results = []
    for case in cases:
        settings = _config(*case)
        results.append(train_sharded(rank, world_size, settings, _batches(settings)))
    return results


CASES = [(kind, pooling, "sgd") for kind in KINDS for pooling in ("sum", "mean")]
CASES += [(kind, "sum", "adagrad") for kind in KINDS]
CASES += [(kind, "mean", "rowwise_adagrad") for kind in KINDS if kind != "column_wise"]
CASES += [(MIXED, "mean", "sgd"), (MIXED, "sum", "adagrad"), (MIXED_ROWS, "mean", "rowwise_adagrad")]
CASES += [(kind, "mean", "sgd", "before") for kind in KINDS if kind != "column_wise"]
CASES += [(kind, "sum", "rowwise_adagrad", "after") for kind in KINDS if kind != "column_wise"]
CASES += [("column_wise", "sum", "sgd", "after"), (MIXED_ROWS, "sum", "adagrad", "before")]
CASES += [(MIXED_ROWS, "mean", "sgd", "after")]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_and_updates_equal_unsharded_torch(world_size):
    for case, found in zip(CASES, run_ranks(_sharded, world_size, CASES)[0], strict=True):
        wanted = case[0] if isinstance(case[0], dict) else dict.fromkeys(MIXED, case[0])
        assert found.plan == {f"main_{table}": kind for table, kind in wanted.items()}, case
        settings = _config(*case)
        assert_same_training(found, train_unsharded(settings, _batches(settings)), f"{case} on {world_size} ranks")


def test_the_collection_is_pipelined():
    cases = [(MIXED_ROWS, "mean", "sgd"), (MIXED_ROWS, "mean", "sgd", "before")]
    for results in run_ranks(_sharded, 2, cases):
        for result in results:
            inside, every = result.pipelined
            assert every
            assert inside == every
