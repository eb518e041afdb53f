"""Draws are functions of (seed, purpose, step, row) and look random."""

from __future__ import annotations

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.data.batch import Batch
from dist_rec.data.draws import Draws, chance
from dist_rec.data.ids import Ragged
from dist_rec.data.views import row_numbers, view_keys, with_empty_views, with_views


def test_ranks_draw_what_one_rank_of_the_whole_batch_draws():
    whole = Draws(3, "x", 17).below(1000, "item", np.arange(60))
    for world_size in (2, 3):
        size = 60 // world_size
        parts = [Draws(3, "x", 17).below(1000, "item", np.arange(r * size, (r + 1) * size)) for r in range(world_size)]
        assert np.concatenate(parts).tolist() == whole.tolist()


def test_seed_purpose_step_name_and_row_all_matter():
    rows = np.arange(5000)
    streams = [
        Draws(*key).bits(name, rows)
        for key in ((3, "x", 17), (4, "x", 17), (3, "y", 17), (3, "x", 18))
        for name in ("a", "b")
    ]
    for i, one in enumerate(streams):
        assert len(np.unique(one)) == len(rows)
        for other in streams[:i]:
            same = (one >> np.uint64(32) & np.uint64(1)) == (other >> np.uint64(32) & np.uint64(1))
            assert abs(same.mean() - 0.5) < 5 * 0.5 / len(rows) ** 0.5


def test_chance_has_its_probability_and_its_ends():
    numbers = Draws(0, "x", 0).bits("a", np.arange(40_000))
    assert not chance(numbers, 0).any()
    assert chance(numbers, 1).all()
    assert abs(chance(numbers, 0.3).mean() - 0.3) < 5 * (0.3 * 0.7 / 40_000) ** 0.5


def test_orders_are_permutations_and_uniform():
    orders = np.array([Draws(0, "x", step).order(4, "f") for step in range(4000)])
    assert (np.sort(orders, axis=1) == np.arange(4)).all()
    for place in range(4):
        counts = np.bincount(orders[:, place], minlength=4)
        assert ((counts - 1000) ** 2 / 1000).sum() < 21.1, "chi-square, 3 degrees, p = 1e-4"


def test_views_are_keys_after_the_others_and_leave_those_alone():
    sparse = KeyedJaggedTensor.from_lengths_sync(
        ["f", "g"], torch.arange(5, dtype=torch.int32), torch.tensor([1, 1, 2, 1], dtype=torch.int32)
    )
    batch = Batch(torch.ones(2, 1), sparse, torch.zeros(2, 0), torch.ones(2))
    bags = {
        "g#a": Ragged(np.array([0, 2]), np.array([7, 8]), None),
        "f#a": Ragged(np.array([1, 0]), np.array([9]), None),
    }
    seen = with_views(batch, bags, {"a": torch.zeros(2, 1)}, {"n": torch.arange(2)})
    assert seen.sparse.keys() == ["f", "g", "g#a", "f#a"]
    assert seen.sparse.values().tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert seen.sparse.lengths().tolist() == [1, 1, 2, 1, 0, 2, 1, 0]
    assert seen.sparse.values().dtype == torch.int32
    assert batch.sparse.keys() == ["f", "g"] and not batch.groups, "the batch it was made from has changed"
    views = {"a": ["g", "f"], "b": ["f"]}
    blank = with_empty_views(batch, views)
    assert blank.sparse.keys() == ["f", "g", *view_keys(views)] == ["f", "g", "g#a", "f#a", "f#b"]
    assert blank.sparse.length_per_key() == [2, 3, 0, 0, 0]
    assert set(blank.view_dense) == {"a", "b"}


def test_weights_of_ids_come_with_a_view():
    sparse = KeyedJaggedTensor.from_lengths_sync(
        ["f"], torch.arange(2), torch.tensor([1, 1], dtype=torch.int32), torch.tensor([0.5, 2.0])
    )
    batch = Batch(torch.ones(2, 0), sparse, torch.zeros(2, 0), torch.ones(2))
    bags = {
        "f#a": Ragged(np.array([1, 0]), np.array([3]), np.array([4.0])),
        "f#b": Ragged(np.ones(2, int), np.ones(2), None),
    }
    assert with_views(batch, bags, {}, {}).sparse.weights().tolist() == [0.5, 2.0, 4.0, 1.0, 1.0]
    assert row_numbers(batch, rank=3).tolist() == [6, 7]
