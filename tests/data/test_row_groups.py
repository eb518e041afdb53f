"""The arithmetic of who reads what: no files, no ranks, no tensors."""

import itertools
import json
import random

import numpy as np
import pytest

from dist_rec.data.footers import DataError
from dist_rec.data.row_groups import Course, EpochOrder, Shuffled, Span, cut, length, positions

SIZES = [[1], [5], [1, 1, 1], [7, 0, 3], [100], [40, 1, 33, 26], [3] * 20, [1000, 2, 37]]


def course(sizes, world_size=1, batch_size=4, shuffle_rows=0, seed=3, epochs=1, cursor=None, data=None):
    return Course(sizes, lambda: data or {"rows": sum(sizes)}, world_size=world_size, batch_size=batch_size,
                  shuffle_rows=shuffle_rows, seed=seed, epochs=epochs, cursor=cursor)  # fmt: skip


def dealt(course, rank, batches=None):
    """Data set rows by batch that a rank deals: what the loader does, without files."""
    starts = np.concatenate([[0], np.cumsum(course.sizes)])
    result = []
    for phase, first in course.phases():
        order = course.order(phase)
        for block in phase.blocks(rank, first):
            parts = [starts[group] + rows for group, rows in order.split(block.rows)]
            rows = np.concatenate(parts) if parts else np.empty(0, np.int64)
            rows = rows if block.order is None else rows[block.order]
            size = phase.batch_size
            for i in range(block.num_batches):
                if batches is not None and len(result) == batches:
                    return result
                result.append(rows[i * size : (i + 1) * size].tolist())
    return result


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("shuffle_rows", [0, 1, 10, 64, 10**6])
def test_every_row_once_and_equal_counts_on_every_rank(sizes, shuffle_rows):
    for world_size, batch_size in itertools.product([1, 2, 3, 5], [1, 4, 7, 300]):
        run = course(sizes, world_size, batch_size, shuffle_rows)
        ranks = [dealt(run, rank) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {run.batches_left}
        assert sorted(flat(flat(ranks))) == list(range(sum(sizes)))
        for batches in ranks:  # only the tail is short
            full = [len(batch) == batch_size for batch in batches]
            assert full == sorted(full, reverse=True)


@pytest.mark.parametrize("seed", range(40))
def test_any_chain_of_stops_and_changed_settings_deals_every_row_once(seed):
    rng = random.Random(seed)
    sizes = rng.choice(SIZES[3:])
    cursor, seen, epochs = None, [], 2
    while True:
        shuffle_rows = rng.choice([0, 8, 8, 30, 10**6])
        run = course(sizes, rng.choice([1, 2, 3]), rng.choice([1, 4, 7]), shuffle_rows, epochs=epochs, cursor=cursor)
        stop = rng.randint(0, min(run.batches_left, 40))
        ranks = [dealt(run, rank, stop) for rank in range(run.at(0)[0].world_size)]
        seen += flat(flat(ranks))
        cursor = json.loads(json.dumps(run.cursor(stop)))
        if stop == run.batches_left:
            break
    assert sorted(seen) == sorted(2 * list(range(sum(sizes))))
    assert course(sizes, epochs=epochs, cursor=cursor).batches_left == 0


@pytest.mark.parametrize("shuffle_rows", [0, 16])
def test_same_settings_go_on_in_the_same_order(shuffle_rows):
    whole = course([40, 1, 33, 26], 2, 4, shuffle_rows, epochs=3)
    for stop in range(whole.batches_left + 1):
        rest = course([40, 1, 33, 26], 2, 4, shuffle_rows, epochs=3, cursor=whole.cursor(stop))
        for rank in range(2):
            assert dealt(rest, rank) == dealt(whole, rank)[stop:]
        # a cursor taken later in the resumed run is the one of the run that never stopped
        assert rest.cursor(rest.batches_left) == whole.cursor(whole.batches_left)


def test_cursor_stays_small_over_many_changes():
    cursor, sizes = None, [1000] * 50
    for world_size in [3, 2] * 5:
        run = course(sizes, world_size, 4, 256, cursor=cursor)
        cursor = run.cursor(100)
    assert len(json.dumps(cursor)) < 40_000


def test_order_is_a_function_of_seed_and_epoch():
    one, same = (course([30] * 10, shuffle_rows=64, epochs=2) for _ in range(2))
    other = course([30] * 10, shuffle_rows=64, epochs=2, seed=4)
    assert dealt(one, 0) == dealt(same, 0)
    assert dealt(one, 0) != dealt(other, 0)
    batches = one.batches_left // 2
    first, second = flat(dealt(one, 0)[:batches]), flat(dealt(one, 0)[batches:])
    assert first != second and sorted(first) == sorted(second)
    assert flat(dealt(course([30] * 10), 0)) == list(range(300))


def test_shuffle_mixes_row_groups_within_the_buffer():
    rows = np.array(flat(dealt(course([50] * 40, shuffle_rows=500), 0)))
    assert np.mean(np.abs(np.diff(rows)) == 1) < 0.02
    assert len(np.unique(rows[:500] // 50)) == 10


def test_cursor_of_other_data_seed_or_numpy_is_refused():
    cursor = course([10, 10]).cursor(1)
    with pytest.raises(DataError, match=r"rows 20 -> 21.*give the same files"):
        course([10, 11], cursor=cursor)
    with pytest.raises(DataError, match=r"seed 3, the config has 9.*set the seed to 3"):
        course([10, 10], seed=9, cursor=cursor)
    with pytest.raises(DataError, match="numpy"):
        course([10, 10], cursor={**cursor, "shuffle_probe": [0]})
    with pytest.raises(DataError, match="version 7"):
        course([10, 10], cursor={**cursor, "version": 7})


def test_cut_and_positions_agree():
    inner = Shuffled((Span(10, 20), Span(0, 5)), (1, 2), 3, 14)
    pieces = (Span(30, 33), inner, Shuffled((inner, Span(40, 44)), (5,), 0, 15), Span(50, 51))
    everything = positions(pieces)
    assert length(pieces) == len(everything) == 30
    for low, high in itertools.combinations(range(31), 2):
        assert positions(cut(pieces, low, high)).tolist() == everything[low:high].tolist()


def test_epoch_order_splits_positions_by_row_group_and_knows_what_is_touched():
    order = EpochOrder(np.array([4, 0, 6]), seed=0, epoch=0, permuted=False)
    split = [(group, rows.tolist()) for group, rows in order.split(np.array([1, 3, 4, 9]))]
    assert split == [(0, [1, 3]), (2, [0, 5])]
    assert {0, 2} <= set(order.touched((Span(1, 5), Shuffled((Span(9, 10),), (0,), 0, 1))))


def test_endless_course():
    run = course([10], epochs=None)
    assert run.batches_left is None
    assert run.at(3 * 1000 + 1)[0].epoch == 1000
    assert run.cursor(3000)["epoch"] == 1000 and run.cursor(3000)["finished"] == 0
