"""The cost model of MLET's exchange against what small jobs send and compute; and that the message is d wide."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.config import RunConfig, from_mapping
from dist_rec.data.batch import Batch
from dist_rec.embeddings import mlet
from dist_rec.recommender import distribute
from dist_rec.training.trainer import GuardedPipeline
from scripts.bench.traffic import calls
from scripts.studies.mlet_cost import ARMS, Job, Rates, break_even, cost, main, table
from tests.ranks import run_ranks
from tests.sharded import runtime

BATCH, FEATURES, IDS, K, D = 12, 4, 60, 32, 8


def _config(arm: str, sharding: str) -> RunConfig:
    layers = {} if arm.startswith("plain") else {"inner_dim": K, "project": "after" if arm == "after" else "before"}
    return from_mapping(
        {
            "schema": {"labels": {"y": None}, "sparse": {f"c{i}": {"num_ids": IDS} for i in range(FEATURES)}},
            "data": {"train": "none", "batch_size": BATCH},
            "model": {"name": "dcn", "dim": K if arm == "plain k" else D, "cross_layers": 1, "deep": [4], "rank": 1},
            "embeddings": {"sharding": sharding, **layers},
            "run": {"device": "cpu"},
        }
    )


def _batch(world_size: int) -> Batch:
    """One id per bag, those of a feature spread evenly over the row-wise shards."""
    rows = torch.arange(BATCH)
    ids = (rows % world_size) * (IDS // world_size) + rows % 5
    return Batch(
        dense=torch.empty(BATCH, 0),
        sparse=KeyedJaggedTensor(
            keys=[f"c{i}" for i in range(FEATURES)],
            values=ids.repeat(FEATURES),
            lengths=torch.ones(BATCH * FEATURES, dtype=torch.int32),
        ),
        labels=(rows % 2).float().unsqueeze(1),
        weights=torch.ones(BATCH),
    )


def _counted(rank: int, world_size: int, sharding: str) -> dict[str, tuple[int, int]]:
    """arm -> bytes of vectors that this rank sends in a step, and FLOP of all its matrix products."""
    found = {}
    for arm in ARMS:
        filled = mlet._MOSTLY_FILLED
        mlet._MOSTLY_FILLED = 1.0 if arm == "packed" else -1.0  # the latter never packs
        try:
            here = runtime(rank, world_size)
            parts = distribute(_config(arm, sharding), here)
            pipeline = GuardedPipeline(parts.model, parts.optimizer, here)
            batches = itertools.repeat(_batch(world_size))
            pipeline.progress(batches)
            with calls() as made, FlopCounterMode(display=False) as flop:
                pipeline.progress(batches)
        finally:
            mlet._MOSTLY_FILLED = filled
        found[arm] = sum(c.sent for c in made if c.is_float), flop.get_total_flops()
    return found


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("sharding", ["row_wise", "table_row_wise"])
def test_bytes_and_flop_are_those_of_the_model(world_size, sharding):
    job = Job(sharding, world_size, world_size, BATCH, FEATURES, ids=1, k=K, d=D)
    for found in run_ranks(_counted, world_size, sharding):
        for arm in ARMS:
            expected = cost(job, arm)
            sent, flop = found[arm]
            assert sent == expected.near and expected.far == 0, arm
            if arm != "plain k":  # whose dense part is another
                assert flop - found["plain d"][1] == pytest.approx(expected.flop), arm
        assert found["before"][0] == found["packed"][0] == found["plain d"][0] > 0, "the message is d wide"
        assert found["after"][0] == found["plain k"][0] == K // D * found["plain d"][0]


def test_table_wise_messages_are_d_wide_too():
    for found in run_ranks(_counted, 2, "table_wise"):
        assert found["before"][0] == found["plain d"][0] > 0
        assert found["after"][0] == K // D * found["plain d"][0]


def _job(**changes: Any) -> Job:
    return Job(**{"sharding": "row_wise", "ranks": 16, "per_node": 8, "batch": 10, "features": 6, "ids": 1, "k": 8,
                  "d": 2, **changes})  # fmt: skip


def test_several_nodes_by_hand():
    # row-wise: 15 times the rank's own 10 x 6 x 2 floats, forward and backward; one of 8 rings leaves the node here
    through = 2 * 15 * 10 * 6 * 2 * 4
    assert (cost(_job(), "before").near, cost(_job(), "before").far) == (through * 7 / 8, through / 8)
    assert cost(_job(per_node=1), "before").far == through, "a lone GPU of a node has no other way"
    # table-row-wise: 3 tables a node; after the sum inside it a rank has 10 x 2 rows of them; half goes away
    both = cost(_job(sharding="table_row_wise"), "plain d")
    assert both.near == 2 * 7 * (10 * 2 * 3 * 2 * 4)
    assert both.far == (10 * 2 * 3 * 2 * 4) / 2 + (10 * 6 * 2 * 4) / 2
    # 10 rows x 16 ranks x 3 tables, and of those one in 8 with one id per bag
    assert cost(_job(sharding="table_row_wise"), "before").flop == 6 * 10 * 16 * 3 * 8 * 2
    assert cost(_job(sharding="table_row_wise"), "packed").flop == pytest.approx(6 * 10 * 16 * 3 * 8 * 2 / 8)
    # with two ids a bag is empty on a shard with probability (7 / 8)^2
    packed = cost(_job(sharding="table_row_wise", ids=2), "packed").flop
    assert packed == pytest.approx(6 * 10 * 16 * 3 * 8 * 2 * (1 - (7 / 8) ** 2))


def test_projecting_first_stops_paying_where_the_model_says_so():
    rates = Rates(flop=1e9, memory=1e30, near=1e9, far=1e9)  # a byte costs as much as a FLOP
    job = _job(ranks=2, k=100)
    # forward and backward 2 x 4 (k - d) bytes saved for each of (W - 1) B F; 6 k d FLOP spent for as many
    expected = next(d for d in range(1, 100) if 6 * 100 * d >= 8 * (100 - d))
    assert break_even(job, rates, "before") == expected == 2
    assert break_even(_job(ranks=64, k=100), rates, "before") == expected, "both grow with the number of ranks alike"
    assert break_even(job, rates, "packed") is None, "packed costs no more FLOP than afterwards"
    assert len(list(table(job, [2, 16], rates))) == 4 + 2 * len(ARMS)


def test_the_command_prints_both_shardings(capsys):
    main(["--ranks", "8", "1024", "--k", "64", "--d", "8"])
    text = capsys.readouterr().out
    assert "row_wise: k = 64, d = 8" in text and "table_row_wise: k = 64, d = 8" in text
    assert text.count("| 1024 | ") == 2 * len(ARMS) and text.count("stops paying") == 4
