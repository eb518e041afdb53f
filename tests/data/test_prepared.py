"""Ids, scales, files and counts of a prepared log, on logs made up here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dist_rec.data import prepared
from dist_rec.data.footers import DataError
from dist_rec.data.prepared import Ids, prepare
from dist_rec.data.raw_log import LEFT_OUT, Block, Days, Lookup, RawLog


@pytest.mark.parametrize("settled", [1, 50, 10**6])
def test_ids_are_the_ranks_of_what_was_seen(monkeypatch: pytest.MonkeyPatch, settled: int) -> None:
    monkeypatch.setattr(prepared, "_SETTLED", settled)
    rng, ids, seen = np.random.default_rng(0), Ids(limit=1000), set[int]()
    for n in (0, 1, 30, 200, 200, 7):
        values = rng.integers(-300, 300, n) * 10**15
        ids.see(values)
        seen |= set(values.tolist())
    rank = {value: i + 1 for i, value in enumerate(sorted(seen))}
    asked = np.arange(-310, 310) * 10**15
    assert ids.encode(asked).tolist() == [rank.get(int(v), 0) for v in asked]
    assert (ids.num_ids, ids.hashed) == (len(rank) + 1, False)


def test_more_values_than_the_limit_share_ids_evenly() -> None:
    ids = Ids(limit=100)
    ids.see(np.arange(100))
    assert (ids.num_ids, ids.hashed) == (101, False)
    ids.see(np.array([7, 100]))
    assert (ids.num_ids, ids.hashed) == (101, True)
    found = ids.encode(np.arange(50_000))
    assert found.min() == 1 and found.max() == 100
    assert np.bincount(found)[1:].min() > 400
    assert ids.encode(np.array([3, 3]))[0] == found[3]


def test_days_of_a_split() -> None:
    assert Days.of(dict.fromkeys(range(10), 5), Path("f")) == (7, 8)
    assert Days.of({1: 90, 2: 5, 3: 5}, Path("f")) == (1, 2)
    assert Days.of({1: 1, 2: 1, 3: 98}, Path("f")) == (1, 2), "a day for each, however unequal they are"
    assert Days.of({5: 70, 1: 10, 9: 4, 7: 10, 8: 6}, Path("f")) == (5, 7)
    assert Days(5, 7).split(np.array([1, 5, 6, 7, 8])).tolist() == [0, 0, 1, 1, 2]
    with pytest.raises(DataError, match=r"f: has rows of 2 day\(s\)"):
        Days.of({1: 5, 2: 5}, Path("f"))


def test_lookup_of_keys_in_any_order() -> None:
    table = Lookup(np.array([7, 3, 5]), {"x": pa.array([70, None, 50]), "tags": pa.array([[7, 8], [], None])})
    found = table.take(np.array([5, 7, 4, 3, 7, 100, -1]), ("x", "tags"))
    assert found["x"].to_pylist() == [50, 70, None, None, 70, None, None]
    assert found["tags"].to_pylist() == [None, [7, 8], None, [], [7, 8], None, None]


def log(blocks: Sequence[tuple[Sequence[int], dict[str, Any]]], **more: Any) -> RawLog:
    """A log of blocks of (splits, columns)."""

    def made() -> Iterator[Block]:
        for split, columns in blocks:
            yield Block(
                np.array(split, np.int8), {n: c if isinstance(c, pa.Array) else pa.array(c) for n, c in columns.items()}
            )

    settings = {"about": "made up", "labels": ("y",), "sparse": ("s",)} | more
    return RawLog(blocks=made, **settings)


def test_what_is_left_out_and_extra_splits(tmp_path: Path) -> None:
    split = [0, 0, 1, 2, LEFT_OUT, 3]
    columns = {
        "y": [1, 0, 1, 1, 1, 0],
        "z": [1, 0, 0, 0, 0, 0],
        "s": [5, 4, 5, 6, 7, None],
        "d": [1.0, None, 3.0, 0.0, 0.0, 0.0],
        "u": [9, 8, 7, 6, 5, 4],
    }
    splits = ("train", "validation", "test", "more", "none")
    made = log([(split, columns)], dense=("d",), groups={"user": "u"}, others=("z",), splits=splits)
    counts = prepare(made, tmp_path / "out")
    assert counts["rows_read"] == 6 and counts["rows_left_out"] == 1
    assert {name: part["rows"] for name, part in counts["splits"].items()} == {
        "train": 2, "validation": 1, "test": 1, "more": 1
    }  # fmt: skip
    assert pq.read_table(tmp_path / "out" / "train").to_pylist() == [
        {"y": 1.0, "z": 1.0, "d": 1.0, "s": 2, "u": 9}, {"y": 0.0, "z": 0.0, "d": None, "s": 1, "u": 8}
    ]  # fmt: skip
    assert pq.read_table(tmp_path / "out" / "test")["s"].to_pylist() == [0], "unseen in training"
    assert not (tmp_path / "out" / "none").exists()
    text = (tmp_path / "out" / "schema.yaml").read_text()
    assert "# The files have the labels z too, which are not declared; a config adds one as `schema.labels.z:" in text
    config = yaml.safe_load(text)
    assert config["data"]["train"] == str(tmp_path / "out" / "train")
    # of ln 2 and, in place of the null, 0
    half = round(np.log(2) / 2, 4)
    assert config["schema"]["dense"] == {"d": {"on_null": "fill", "transform": "log1p", "mean": half, "std": half}}
    assert config["schema"]["sparse"] == {"s": {"num_ids": 3}}


def test_files_and_row_groups_have_their_size_whatever_the_blocks_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "ROW_GROUP_ROWS", 100)
    monkeypatch.setattr(prepared, "ROWS_PER_FILE", 300)
    blocks = []
    for i, rows in enumerate((40, 1, 0, 700, 13, 190, 6)):
        blocks.append(([0] * rows + [1, 2], {"y": [0] * (rows + 2), "s": [i * 1000 + j for j in range(rows + 2)]}))
    prepare(log(blocks), tmp_path / "out")
    sizes = []
    for path in sorted((tmp_path / "out" / "train").iterdir()):
        metadata = pq.ParquetFile(path).metadata
        sizes.append([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
    assert sizes == [[100, 100, 100], [100, 100, 100], [100, 100, 100], [50]]
    values = pq.read_table(tmp_path / "out" / "train")["s"].to_pylist()
    assert values == list(range(1, 951)), "every row once, in order; ids are ranks"
    assert len(pq.read_table(tmp_path / "out" / "test")) == 7


def test_a_split_without_rows_and_a_log_without_training_rows_are_errors(tmp_path: Path) -> None:
    columns = {"y": [0, 1], "s": [1, 2]}
    with pytest.raises(DataError, match=r"no row for test; are they whole\? \(made up\)"):
        prepare(log([([0, 1], columns)]), tmp_path / "out")
    with pytest.raises(DataError, match="no row of the raw files is a training row"):
        prepare(log([([1, 2], columns)]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_numbers_that_no_float_has_and_constant_columns(tmp_path: Path) -> None:
    columns = {"y": [0, 1, 0, 1], "s": [1, 2, 3, 4], "big": [2**31 + 1, 2**24 + 1, 5, 6], "same": [3, 3, 3, 3]}
    prepare(log([([0, 0, 1, 2], columns)], dense=("big", "same")), tmp_path / "out")
    schema = yaml.safe_load((tmp_path / "out" / "schema.yaml").read_text())["schema"]
    assert schema["dense"]["same"] == {"transform": "log1p", "mean": round(np.log(4), 4), "std": 1.0}
    big = pq.read_table(tmp_path / "out" / "train")["big"].to_pylist()
    assert big == [float(np.float32(2**31 + 1)), float(np.float32(2**24 + 1))]
