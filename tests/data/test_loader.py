"""The loader end to end, on Parquet files written by the tests."""

import dataclasses
import gc
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dist_rec.data.footers import DataError, read_footers
from dist_rec.data.loader import DataConfig, Loader
from dist_rec.data.read_ahead import DaemonPool, RowGroupCache
from dist_rec.data.schema import DenseColumn, GroupColumn, LabelColumn, Schema, SparseColumn, WeightColumn

ROWS, FILES = 500, 3
REAL = Path(os.environ.get("DIST_REC_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def table(start, rows):
    """Every column is a function of row_id, so that a batch can be checked row by row."""
    row = np.arange(start, start + rows)
    lengths = row % 4
    history = np.repeat(row, lengths) % 97
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.table({
        "label": (row % 2).astype(np.float32),
        "x": (row / 10).astype(np.float32),
        "y": row.astype(np.float64),
        "row_id": row,
        "small": (row % 7).astype(np.int8),
        "history": pa.ListArray.from_arrays(offsets, history),
        "strength": pa.ListArray.from_arrays(offsets, (history / 97).astype(np.float32)),
        "maybe": pa.array(row % 5, mask=row % 3 == 0),
        "weight": (1 + row % 3).astype(np.float32),
    })  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    for i in range(FILES):
        rows = ROWS // FILES + (i < ROWS % FILES)
        start = sum(ROWS // FILES + (j < ROWS % FILES) for j in range(i))
        pq.write_table(table(start, rows), path / f"{i}.parquet", row_group_size=37)
    return str(path)


FIXED = Schema(
    labels={"label": LabelColumn()},
    sparse={"row_id": SparseColumn(ROWS), "small": SparseColumn(7)},
    dense={"x": DenseColumn(), "y": DenseColumn(mean=1.0)},
    weight=WeightColumn("weight"),
    groups={"row": GroupColumn("row_id")},
)
MIXED = dataclasses.replace(
    FIXED,
    sparse={
        "history": SparseColumn(97, multi=True, weights="strength"),
        "row_id": SparseColumn(ROWS),
        "maybe": SparseColumn(5, on_null="empty"),
    },
)


def load(folder, schema=FIXED, *, shuffle=True, shuffle_rows=64, batch_size=16, rank=0, world_size=1, epochs=1, **more):
    config = DataConfig(train=folder, batch_size=batch_size, shuffle_rows=shuffle_rows)
    return Loader(config, schema, read_footers(folder), rank=rank, world_size=world_size, batch_size=batch_size, seed=5,
                  shuffle=shuffle, epochs=epochs, **more)  # fmt: skip


def rows_of(batch):
    """Ids of the rows that are no padding."""
    return batch.groups["row"][batch.weights > 0].tolist()


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def check(batch, schema, batch_size):
    """That every tensor is what `table` says of the batch's rows, then padding."""
    real = int((batch.weights > 0).sum())
    row = batch.groups["row"].numpy()
    mask = np.arange(batch_size) < real
    assert batch.dense.shape == (batch_size, 2) and batch.dense.is_contiguous()
    np.testing.assert_allclose(batch.dense.numpy(), np.where(mask[:, None], np.c_[row / 10, row - 1.0], 0), rtol=1e-6)
    assert batch.labels.tolist() == (mask * (row % 2))[:, None].tolist()
    assert batch.weights.tolist() == (mask * (1 + row % 3)).tolist()
    assert (row[~mask] == -1).all()
    assert batch.sparse.keys() == list(schema.sparse)
    assert batch.sparse.values().dtype == batch.sparse.lengths().dtype == torch.int32
    want = {"row_id": lambda r: [r], "small": lambda r: [r % 7], "history": lambda r: [r % 97] * (r % 4),
            "maybe": lambda r: [r % 5] if r % 3 else []}  # fmt: skip
    for name, bags in batch.sparse.to_dict().items():
        lists = [part.tolist() for part in torch.split(bags.values(), bags.lengths().tolist())]
        assert lists == [want[name](r) if real_row else [] for r, real_row in zip(row.tolist(), mask, strict=True)]
        if schema.is_weighted:
            strength = bags.values().numpy() / 97 if name == "history" else np.ones(len(bags.values()))
            np.testing.assert_allclose(bags.weights().numpy(), strength, rtol=1e-6)


@pytest.mark.parametrize("schema", [FIXED, MIXED], ids=["fixed", "mixed"])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 16), (2, 16), (3, 50), (2, 1000), (1, 500)])
def test_every_value_of_every_row_once(folder, schema, shuffle, world_size, batch_size):
    seen, counts = [], set()
    for rank in range(world_size):
        loader = load(folder, schema, shuffle=shuffle, batch_size=batch_size, rank=rank, world_size=world_size)
        batches = list(loader)
        for batch in batches:
            check(batch, schema, batch_size)
            seen += rows_of(batch)
        counts |= {len(batches), loader.batches_left}
    assert sorted(seen) == list(range(ROWS)) and len(counts) == 1
    assert (seen == list(range(ROWS))) == (not shuffle)


def test_kjt_survives_what_torchrec_does_with_it(folder):
    batch = next(iter(load(folder, MIXED)))
    moved = batch.to(torch.device("cpu")).sparse
    assert moved.stride() == 16 and moved.length_per_key() == [int(x.sum()) for x in moved.lengths().view(3, 16)]
    assert moved.offset_per_key()[-1] == len(moved.values())
    assert [len(part.values()) for part in moved.split([1, 2])] == [
        moved.length_per_key()[0],
        sum(moved.length_per_key()[1:]),
    ]


@pytest.mark.parametrize("schema", [FIXED, MIXED], ids=["fixed", "mixed"])
def test_resume_is_exact_with_the_same_and_with_another_world_size(folder, schema):
    def run(world_size, cursor, stop):
        loaders = [
            load(folder, schema, rank=r, world_size=world_size, epochs=2, cursor=cursor) for r in range(world_size)
        ]
        rows = []
        for loader in loaders:
            rows.append([rows_of(batch) for _, batch in zip(range(stop), loader, strict=False)])
            loader.close()
        assert len({str(loader.cursor(stop)) for loader in loaders}) == 1
        return rows, loaders[0].cursor(stop), loaders[0].batches_left

    whole, _, left = run(2, None, 100)
    first, cursor, _ = run(2, None, 7)
    second, _, _ = run(2, cursor, 100)
    assert [a + b for a, b in zip(first, second, strict=True)] == whole and len(whole[0]) == left
    seen = flat(flat(first))
    for world_size, stop in ((3, 4), (1, 5), (2, 100)):
        rows, cursor, _ = run(world_size, cursor, stop)
        seen += flat(flat(rows))
    assert sorted(seen) == sorted(2 * list(range(ROWS)))


def test_epochs_differ_and_iterating_again_repeats(folder):
    loader = load(folder, epochs=2)
    rows = [rows_of(batch) for batch in loader]
    assert [rows_of(batch) for batch in loader] == rows
    half = len(rows) // 2
    assert rows[:half] != rows[half:] and sorted(flat(rows[:half])) == sorted(flat(rows[half:]))


def test_batches_of_a_block_do_not_change_under_the_consumer(folder):
    for schema in (FIXED, MIXED):
        for shuffle in (False, True):
            for batch in list(load(folder, schema, shuffle=shuffle)):
                check(batch, schema, 16)


def test_where_names_files_row_groups_and_rows(folder):
    loader = load(folder, shuffle=False, rank=1, world_size=2)
    text = loader.where(0)
    assert "epoch 0, batch 0 of 16, rank 1" in text
    assert f"{folder}/1.parquet row group 2, rows 83..98" in text
    assert "only padding" in load(folder, rank=0, world_size=501).where(0)
    assert "row group" in load(folder).where(3)


def test_wrong_value_is_raised_in_the_consumer(folder):
    narrow = dataclasses.replace(FIXED, sparse={"row_id": SparseColumn(300)})
    loader = load(folder, narrow, shuffle=False, shuffle_rows=64)
    with pytest.raises(DataError, match=r"id 300 is outside 0..299 at row 133 of .*1.parquet \(row group 3\)"):
        list(loader)
    with pytest.raises(DataError, match=r"id \d+ is outside 0..299 at row \d+ of"):
        list(load(folder, narrow, shuffle_rows=64))


def test_policy_counts_are_those_of_the_rows_dealt(folder):
    loader = load(folder, MIXED, epochs=2)
    list(loader)
    assert loader.counts == {"maybe.null=empty": 2 * len(range(0, ROWS, 3))}


def test_a_file_that_changes_under_the_run_is_noticed(tmp_path):
    pq.write_table(table(0, 50), tmp_path / "a.parquet", row_group_size=50)
    loader = load(str(tmp_path))
    pq.write_table(table(0, 20), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has 20 rows, had 50 when the run began"):
        list(loader)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError, match=r"a.parquet: cannot be read .*correct the path"):
        list(loader)
    pq.write_table(table(0, 50), tmp_path / "a.parquet", row_group_size=25)
    loader = load(str(tmp_path))
    pq.write_table(table(0, 25), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row group 1 cannot be read"):
        list(loader)


def test_one_block_is_ready_while_the_one_before_is_consumed_and_no_more(folder):
    assembled = []

    def note(batch, number):
        assembled.append(number)
        return batch

    per_block = 20
    loader = load(folder, batch_size=4, shuffle_rows=4 * per_block, epochs=None, transform=note)
    for i, _ in enumerate(loader):
        if i == 2 * per_block + per_block // 2:  # in the middle of a block
            break
        assert len(assembled) - i <= per_block + 2 * 4 + 1
        deadline = time.monotonic() + 5
        while len(assembled) - i < per_block and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(assembled) - i >= per_block


def test_a_fingerprint_is_made_once_and_only_for_cursors(folder, monkeypatch):
    calls = []
    monkeypatch.setattr("dist_rec.data.loader.fingerprint", lambda footers: calls.append(footers) or {"rows": ROWS})
    loader = load(folder)
    list(loader)
    assert not calls
    assert loader.cursor(1)["data"] == loader.cursor(2)["data"] == {"rows": ROWS} and len(calls) == 1


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(("assemble", "decode"))]


def test_stopping_early_ends_the_threads(folder):
    loader = load(folder, epochs=None)
    iterator = iter(loader)
    next(iterator)
    assert threads()
    began = time.perf_counter()
    loader.close()
    loader.close()
    assert list(iterator) == [] and time.perf_counter() - began < 3
    for batch in loader:  # a new pass works after close; leaving it ends it
        assert len(rows_of(batch)) == 16
        break
    gc.collect()
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()


class _RowGroup:
    """A stand-in for a decoded row group of which one can know how many are alive."""


def test_few_row_groups_are_in_memory_at_a_time_and_each_is_decoded_once():
    alive, most, decoded = [], [], []

    def decode(group):
        result = _RowGroup()
        alive[:] = [ref for ref in alive if ref() is not None] + [weakref.ref(result)]
        most.append(len(alive))
        decoded.append(group)
        return result

    plan = [3, 1, 2, 0, 4, 5, 9, 8]
    for ahead in (1, 3):
        pool = DaemonPool(2, "decode")
        cache = RowGroupCache(plan, decode, pool, ahead)
        for group in plan:
            for _ in range(3):
                cache.get(group)
                time.sleep(0.002)
        cache.close()
        pool.close()
        assert sorted(decoded) == sorted(plan) and max(most) <= ahead + 2
        decoded.clear()
        most.clear()


def test_memory_does_not_grow_with_the_files(tmp_path):
    rows, before = 200_000, pa.total_allocated_bytes()
    pq.write_table(table(0, rows), tmp_path / "a.parquet", row_group_size=5000)
    peak = 0
    schema = dataclasses.replace(FIXED, sparse={"row_id": SparseColumn(rows)})
    for batch in load(str(tmp_path), schema, shuffle_rows=4096, batch_size=1024):
        peak = max(peak, pa.total_allocated_bytes() - before)
        assert len(batch.weights) == 1024
    whole = pq.read_table(tmp_path / "a.parquet", columns=schema.columns()).nbytes
    assert peak < whole / 5


def test_transform_runs_on_every_batch_with_its_number(folder):
    def mark(batch, number):
        return dataclasses.replace(batch, view_dense={"number": torch.full((16, 1), float(number))})

    for i, batch in enumerate(load(folder, transform=mark)):
        assert batch.view_dense["number"][0, 0] == i


def test_wait_is_counted(folder):
    loader = load(folder)
    list(loader)
    assert loader.wait_seconds > 0


def test_config_complaints():
    bad = DataConfig(train="x", batch_size=0, eval_batch_size=0, shuffle_rows=0, decode_threads=0)
    assert [c.key for c in bad.check()] == [
        "batch_size",
        "eval_batch_size",
        "shuffle_rows",
        "decode_threads",
    ]
    assert not list(DataConfig(train="x", batch_size=1).check())


_MEMORY = """
import sys
from pathlib import Path
from dist_rec.data.footers import read_footers
from dist_rec.data.loader import DataConfig, Loader
from scripts.bench.loader import schema, write

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6

def load(folder, rows, row_group, batches):
    folder = Path(sys.argv[1]) / folder
    folder.mkdir()
    write(folder, rows, row_group)
    loader = Loader(DataConfig(str(folder), 1024), schema(), read_footers(str(folder)), rank=0, world_size=1,
                    batch_size=1024, seed=0, shuffle=True, epochs=None)
    before = peak = resident()
    for i, _ in enumerate(loader):
        peak = max(peak, resident())
        if i == batches:
            break
    return peak - before, loader.describe()

load("small", 3000, 1000, 5)  # what libraries take when they are first used
print(*load("large", 600_000, ROW_GROUP, 1500), sep="|")
"""


@pytest.mark.parametrize("row_group", [200_000, 30_000])
def test_memory_is_what_is_said(tmp_path, row_group):
    root = Path(__file__).parents[2]
    code = _MEMORY.replace("ROW_GROUP", str(row_group))
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=True, capture_output=True)
    grown, text = out.stdout.decode().strip().split("|")
    said = float(re.search(r"about ([\d,]+) MB per rank", text)[1].replace(",", ""))
    assert 0.7 < said / float(grown) < 1.4, f"grew by {grown} MB: {text}"


def test_real_parquet():
    path = REAL / "ml100k" / "ratings.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there; set DIST_REC_DATA to the folder with the real data sets")
    file = pq.read_table(path)
    integers = [f.name for f in file.schema if pa.types.is_integer(f.type)]
    lists = [f.name for f in file.schema if pa.types.is_list(f.type)]
    schema = Schema(
        labels={"label": LabelColumn(kind="real")},
        sparse={name: SparseColumn(1000, out_of_range="hash", multi=name in lists) for name in [*integers, *lists]},
    )
    rows, ids = 0.0, 0
    for batch in load(str(path), schema, batch_size=4096, shuffle_rows=20_000):
        rows += float(batch.weights.sum())
        ids += len(batch.sparse.values())
    assert rows == file.num_rows
    assert ids == len(integers) * file.num_rows + sum(len(file[name].combine_chunks().flatten()) for name in lists)
