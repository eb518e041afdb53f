"""From requests for tables and settings to the list of tables: arithmetic, no tensors."""

from __future__ import annotations

from typing import Any

import pytest

from dist_rec.contract import TableSet
from dist_rec.data.schema import Schema, SparseColumn
from dist_rec.embeddings.tables import EmbeddingsConfig, Table, TableOptions, make_tables

SCHEMA = Schema(labels={}, sparse={name: SparseColumn(num_ids=n) for name, n in (("small", 32), ("large", 33))})


def _tables(config: EmbeddingsConfig, dims: dict[str, int] | None = None) -> dict[str, Table]:
    sets = [TableSet(name, ("small", "large"), dim) for name, dim in (dims or {"main": 8}).items()]
    return {table.name: table for table in make_tables(sets, SCHEMA, config)}


@pytest.mark.parametrize(
    ("settings", "small", "large"),
    [
        ({}, None, None),
        ({"inner_dim": 16}, None, 16),
        ({"inner_dim": 0, "factor_above": 0.0}, None, None),
        ({"inner_dim": 16, "factor_above": 0.0}, 16, 16),
        ({"inner_dim": 16, "factor_above": 5.0}, None, None),
        ({"inner_dim": 16, "tables": {"small": TableOptions(inner_dim=8)}}, 8, 16),
        ({"inner_dim": 16, "tables": {"main_large": TableOptions(inner_dim=0)}}, None, None),
        ({"tables": {"small": TableOptions(inner_dim=12)}}, 12, None),
    ],
)
def test_which_tables_get_two_layers(settings: dict[str, Any], small: int | None, large: int | None) -> None:
    """Those of more than factor_above * d rows, 32 here; what is said of a table overrules that."""
    found = _tables(EmbeddingsConfig(**settings))
    assert (found["main_small"].inner_dim, found["main_large"].inner_dim) == (small, large)
    assert [t.width for t in found.values()] == [small or 8, large or 8]
    assert [t.dim for t in found.values()] == [8, 8]


def test_what_is_said_of_one_sets_table_leaves_the_rest_as_it_is_said_of_all() -> None:
    """A fix that an error proposes for "<set>_<table>" must not undo how the table pools."""
    both = {
        "large": TableOptions(pooling="mean", inner_dim=12, sharding="row_wise"),
        "expert_large": TableOptions(sharding="table_wise", init_bound=0.5),
    }
    found = _tables(EmbeddingsConfig(tables=both), {"main": 8, "expert": 4})
    main, expert = found["main_large"], found["expert_large"]
    assert (main.pooling, main.inner_dim, main.sharding) == ("mean", 12, "row_wise")
    assert (expert.pooling, expert.inner_dim, expert.sharding, expert.init_bound) == ("mean", 12, "table_wise", 0.5)
    assert main.init_bound == pytest.approx(33**-0.5)
