"""Layouts of several table sets on the same features: wide tables train as separate ones, and send their ids once."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from dist_rec.config import RunConfig
from dist_rec.recommender import build, distribute
from dist_rec.settings import ConfigError
from dist_rec.training.trainer import GuardedPipeline
from scripts.bench.traffic import calls
from tests.domains import global_rows, settings, some_steps
from tests.examples import share
from tests.parity import unsharded
from tests.ranks import run_ranks
from tests.sharded import runtime


def _columns(state: Mapping[str, Tensor], run: RunConfig) -> dict[str, Tensor]:
    """Every table set's columns of every table, by "<set>_<table>", and everything that is no table."""
    _, tables = build(run)
    found = {}
    for name, value in state.items():
        table = next((t for t in tables if name.endswith(f".{t.name}.weight")), None)
        if table is None:
            found[name] = value
            continue
        for block, part in zip(table.blocks, value.split([b.width for b in table.blocks], dim=1), strict=True):
            found[block.name] = part
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_wide_tables_train_as_separate_ones(optimizer: str, world_size: int) -> None:
    for sharding in ("table_wise", "row_wise", "column_wise"):
        layouts = []
        for layout in ("separate", "wide"):
            layouts.append(
                settings(
                    alpha=0.5,
                    embeddings={"layout": layout, "sharding": sharding, "pooling": "mean"},
                    sharding={"min_columns": 4},
                    optim={"tables": {"name": optimizer, "lr": 0.1}, "dense": {"name": "sgd", "lr": 0.1}},
                )
            )
        separate, wide = run_ranks(some_steps, world_size, layouts)[0]
        assert {len(t.blocks) for t in build(layouts[1])[1]} == {3, 4}
        assert len(wide.plan) == 4 and len(separate.plan) == 4 * 3 + 3
        for when in ("before", "after"):
            theirs, mine = (
                _columns(getattr(result, when), run) for result, run in zip((separate, wide), layouts, strict=True)
            )
            assert mine.keys() == theirs.keys()
            for name, value in theirs.items():
                if when == "before" or world_size == 1:
                    assert torch.equal(mine[name], value), f"{sharding}: {name} {when}"
                # several ranks exchange the gradients of a wide row in other pieces, in another order of sums
                torch.testing.assert_close(mine[name], value, atol=1e-6, rtol=1e-5)


def _bytes_of_ids(rank: int, world_size: int, runs_of: list[RunConfig]) -> list[int]:
    """For each run, how many bytes of ids and lengths this rank sends in a step."""
    found = []
    for run in runs_of:
        here = runtime(rank, world_size)
        parts = distribute(run, here)
        pipeline = GuardedPipeline(parts.model, parts.optimizer, here)
        batches = itertools.repeat(share(global_rows(run.schema, 0), rank, world_size))
        pipeline.progress(batches)
        with calls() as made:
            pipeline.progress(batches)
        found.append(sum(c.sent for c in made if not c.is_float and c.name == "all_to_all_single"))
    return found


def test_a_wide_table_is_sent_its_ids_once() -> None:
    embeddings = {"sharding": "row_wise"}
    wide = settings("me_mmoe", embeddings={**embeddings, "layout": "wide"})
    separate, one_set = settings("me_mmoe", embeddings=embeddings), settings("mmoe", embeddings=embeddings)
    for found in run_ranks(_bytes_of_ids, 2, [separate, wide, one_set]):
        assert found[1] == found[2] > 0, "as many as a model with a single set"
        assert found[0] > 1.8 * found[1], "two sets send them twice; a few bytes of sizes are sent once"


def test_row_wise_adagrad_is_another_optimiser_in_a_wide_table() -> None:
    optim = {"tables": {"name": "rowwise_adagrad", "lr": 0.1}, "dense": {"name": "sgd", "lr": 0.1}}
    layouts = [settings(optim=optim, embeddings={"layout": layout}) for layout in ("separate", "wide")]
    separate, wide = (_columns(unsharded(run, 2, global_rows).after, run) for run in layouts)
    assert not torch.allclose(separate["expert_0_user"], wide["expert_0_user"], atol=1e-3)


def test_a_wide_table_takes_settings_of_all_its_sets_only() -> None:
    with pytest.raises(ConfigError, match=r"embeddings.tables.expert_0_user: is for one table set.*name it 'user'"):
        settings(embeddings={"layout": "wide", "tables": {"expert_0_user": {"pooling": "mean"}}})
    with pytest.raises(ConfigError, match=r"embeddings.layout: is wide, but the tables of 'user' have two layers"):
        settings(embeddings={"layout": "wide", "inner_dim": 16})
    # a feature of one set keeps its own name and may have anything
    run = settings(embeddings={"layout": "wide", "tables": {"user": {"pooling": "mean"}}})
    tables = {t.name: t for t in build(run)[1]}
    assert tables["wide_user"].pooling == "mean" and tables["wide_items"].pooling == "sum"
    assert [b.name for b in tables["wide_user"].blocks] == [*(f"expert_{m}_user" for m in range(3)), "prior_user"]
    # the set "prior" asks for "item" alone, whose table "query" reads too
    assert tables["wide_items"].features == ("item", "query") and tables["wide_items"].dim == 3 * 8 + 4
