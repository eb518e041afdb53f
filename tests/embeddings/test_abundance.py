"""Information abundance: by hand, and of sharded tables against singular values of whole ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from dist_rec.config import RunConfig
from dist_rec.contract import TableSet
from dist_rec.data.schema import Schema
from dist_rec.embeddings import abundance as module
from dist_rec.embeddings.abundance import abundance
from dist_rec.embeddings.sharding import initialise
from dist_rec.models import dlrm
from dist_rec.recommender import build, distribute
from tests.examples import config
from tests.ranks import run_ranks
from tests.sharded import runtime

TABLES = ("user", "items", "tags", "hour")
KINDS = ["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]


def of(table: torch.Tensor) -> float:
    return abundance(table.T @ table)


def test_by_hand_and_at_its_extremes() -> None:
    assert of(torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))) == pytest.approx(4 / 3)
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(50, 1, generator=generator).double() @ torch.randn(1, 6, generator=generator).double()
    assert of(line) == pytest.approx(1, abs=1e-6)
    orthonormal, _ = torch.linalg.qr(torch.randn(50, 6, generator=generator).double())
    assert of(orthonormal) == pytest.approx(6, rel=1e-12)
    table = torch.randn(50, 6, generator=generator).double()
    values = torch.linalg.svdvals(table)
    assert of(table) == pytest.approx(float(values.sum() / values.max()), rel=1e-12)
    assert of(table * 1e-3) == pytest.approx(of(table), rel=1e-12)
    assert 1 < of(table @ torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0]).double())) < 3
    assert math.isnan(of(torch.zeros(5, 3)))
    assert math.isnan(of(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))


def settings(kind: str, project: str | None) -> RunConfig:
    return config(
        embeddings={
            "tables": {t: {"sharding": kind} for t in TABLES},
            **({"inner_dim": 16, "project": project} if project else {}),  # of all but "hour", which is too small
        },
        optim={"tables": {"name": "adagrad"}},
        sharding={"min_columns": 4},
        metrics={"information_abundance": True},
    )


CASES = [(kind, None) for kind in KINDS]
CASES += [("row_wise", "before"), ("table_wise", "before"), ("data_parallel", "before"), ("column_wise", "after")]


def on_ranks(rank: int, world_size: int) -> list[dict[str, float]]:
    module.BLOCK_ROWS = 40  # several blocks of every table
    try:
        return [distribute(settings(*case), runtime(rank, world_size)).diagnostics.tables() for case in CASES]
    finally:
        module.BLOCK_ROWS = 65536


@dataclass
class TwoSets(dlrm.Config):
    """An arch that looks up a second set, whose tables the wide layout puts beside those of the first."""

    def table_sets(self, schema: Schema) -> list[TableSet]:
        """ "main", and "more" of two of its features and twice its width."""
        return [*super().table_sets(schema), TableSet("more", ("user", "tags"), 2 * self.dim)]


def wide(rank: int, world_size: int) -> dict[str, dict[str, float]]:
    found = {}
    for layout in ("separate", "wide"):
        two = settings("row_wise", None)
        two.model, two.embeddings.layout = TwoSets(dim=8, bottom=[16], top=[16]), layout
        found[layout] = distribute(two, runtime(rank, world_size)).diagnostics.tables()
    return found


def test_sets_in_one_wide_table_have_the_abundance_of_their_own_columns() -> None:
    for found in run_ranks(wide, 2):
        assert set(found["wide"]) == {
            "information_abundance", "information_abundance/main", "information_abundance/more",
            *(f"information_abundance/main/{t}" for t in TABLES),
            *(f"information_abundance/more/{t}" for t in ("user", "tags")),
        }  # fmt: skip
        assert found["wide"] == pytest.approx(found["separate"], rel=1e-12)  # both layouts start from the same values
        assert found["wide"]["information_abundance/more"] > 8 > found["wide"]["information_abundance/main"]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sharded_tables_have_the_abundance_of_whole_ones(world_size: int) -> None:
    every_rank = run_ranks(on_ranks, world_size)
    for i, case in enumerate(CASES):
        model, _ = build(settings(*case), table_device="cpu")
        state = model.state_dict()
        initialise(state, build(settings(*case))[1], seed=3)
        expected = {}
        for table in TABLES:
            whole = state[f"embeddings.collection.embedding_bags.main_{table}.weight"].double()
            if f"embeddings.projections.main_{table}" in state:
                whole = whole @ state[f"embeddings.projections.main_{table}"].double()
            values = torch.linalg.svdvals(whole)
            assert whole.shape[1] == 8
            expected[f"information_abundance/main/{table}"] = float(values.sum() / values.max())
        mean = sum(expected.values()) / len(expected)
        expected |= {"information_abundance": mean, "information_abundance/main": mean}
        for found in every_rank:
            assert found[i] == pytest.approx(expected, rel=1e-9), case
