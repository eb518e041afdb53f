"""Sharded equals unsharded: losses, and updates of every parameter, for every sharding, optimiser and pooling."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest

from dist_rec.config import RunConfig
from tests.examples import config, mapping
from tests.parity import sharded, unsharded, update_errors
from tests.ranks import run_ranks

KINDS = ["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]
MIXED = {"user": "row_wise", "items": "table_wise", "tags": "column_wise", "hour": "data_parallel"}
MIXED_ROWS = {"user": "row_wise", "items": "table_row_wise", "tags": "table_wise", "hour": "data_parallel"}


class Case(NamedTuple):
    """weighted: the ids of "tags" have a weight each. two_layers: tables, with `project`; by default all worth it."""

    sharding: str | dict[str, str]
    pooling: str
    optimizer: str
    project: str | None = None
    weighted: bool = False
    two_layers: tuple[str, ...] = tuple(MIXED)

    def config(self) -> RunConfig:
        """What the case stands for."""
        kinds = self.sharding if isinstance(self.sharding, dict) else dict.fromkeys(MIXED, self.sharding)
        tables: dict[str, dict[str, Any]] = {t: {"sharding": kind} for t, kind in kinds.items()}
        for table in kinds.keys() - set(self.two_layers):
            tables[table]["inner_dim"] = 0
        # "hour" has too few rows to be factored and stays a plain table beside the two-layer ones
        layers = {"inner_dim": 16, "project": self.project} if self.project else {}
        sparse = mapping()["schema"]["sparse"]
        sparse["tags"] |= {"weights": "tag_weights"} if self.weighted else {}
        return config(
            schema={"sparse": sparse},
            embeddings={"pooling": self.pooling, "tables": tables, **layers},
            sharding={"min_columns": 4},
            optim={"tables": {"name": self.optimizer, "lr": 0.1}, "dense": {"name": "sgd", "lr": 0.1}},
            model={"name": "dlrm", "dim": 8, "bottom": [16], "top": [16]},
        )


CASES = [(kind, pooling, "sgd") for kind in KINDS for pooling in ("sum", "mean")]
CASES += [(kind, "sum", "adagrad") for kind in KINDS]
CASES += [(kind, "mean", "rowwise_adagrad") for kind in KINDS if kind != "column_wise"]
CASES += [(MIXED, "mean", "sgd"), (MIXED, "sum", "adagrad"), (MIXED_ROWS, "mean", "rowwise_adagrad")]
CASES += [(kind, "mean", "sgd", "before") for kind in KINDS if kind != "column_wise"]
CASES += [(kind, "sum", "rowwise_adagrad", "after") for kind in KINDS if kind != "column_wise"]
CASES += [("column_wise", "sum", "sgd", "after"), (MIXED_ROWS, "sum", "adagrad", "before")]
CASES += [(MIXED_ROWS, "mean", "sgd", "after")]
CASES += [(kind, "sum", "sgd", None, True) for kind in KINDS]
CASES += [(kind, "sum", "sgd", "before", True) for kind in (*KINDS, MIXED_ROWS) if kind != "column_wise"]
CASES += [("column_wise", "sum", "sgd", "after", True)]
CASES += [("table_column_wise", "mean", "adagrad")]
# one two-layer table, so that some ranks hold none
LONELY = {**MIXED_ROWS, "user": "table_wise"}
CASES += [(kind, "sum", "sgd", "before", False, ("user",)) for kind in ("table_wise", MIXED_ROWS, LONELY)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_and_updates_equal_unsharded_torch(world_size):
    """And the collection is pipelined in every case."""
    cases = [Case(*case) for case in CASES]
    results = run_ranks(sharded, world_size, [case.config() for case in cases])[0]
    for case, result in zip(cases, results, strict=True):
        expected = unsharded(case.config())
        wanted = case.sharding if isinstance(case.sharding, dict) else dict.fromkeys(MIXED, case.sharding)
        assert result.plan == {f"main_{table}": kind for table, kind in wanted.items()}, case
        assert result.losses == pytest.approx(expected.losses, abs=1e-5), case
        assert result.pipelined[0] == result.pipelined[1] != [], case
        for name, error in update_errors(result, expected).items():
            assert error < 1e-4, f"{case} on {world_size} ranks: the update of {name} is off by {error:.1e}"


@pytest.mark.parametrize(("world_size", "ranks_per_node"), [(3, 1), (4, 2)])
def test_so_do_they_on_several_nodes(world_size, ranks_per_node):
    """Table-row-wise tables then cross nodes by an exchange of its own, which divides gradients once more."""
    cases = [Case("table_row_wise", "mean", "sgd"), Case("table_row_wise", "sum", "sgd", "before", True)]
    cases += [Case(MIXED_ROWS, "sum", "adagrad", "before"), Case(MIXED_ROWS, "mean", "sgd", "after")]
    run = partial(sharded, ranks_per_node=ranks_per_node)
    results = run_ranks(run, world_size, [case.config() for case in cases])[0]
    for case, result in zip(cases, results, strict=True):
        expected = unsharded(case.config())
        assert "table_row_wise" in result.plan.values(), case
        assert result.losses == pytest.approx(expected.losses, abs=1e-5), case
        for name, error in update_errors(result, expected).items():
            assert error < 1e-4, (
                f"{case} on {world_size // ranks_per_node} nodes: the update of {name} is off by {error:.1e}"
            )
