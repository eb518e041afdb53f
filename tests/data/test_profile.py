"""What is measured of columns, against the same by hand; bounds from footers; samples that are small and spread."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.data.footers import DataError, read_footers
from dist_rec.data.profile import estimate_distinct, profile


def write(path, row_group_size=100, statistics=True, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size, write_statistics=statistics)
    return path


def measured(path, rows=10**6, **arguments):
    return profile(read_footers(str(path)), rows, **arguments)


def test_every_kind_is_measured_exactly_where_all_rows_are_read(tmp_path):
    write(
        tmp_path / "a.parquet",
        i=pa.array([5, None, -1, 5], pa.int32()),
        u=pa.array([2**63 + 1, 3, None, 4], pa.uint64()),
        f=pa.array([0.5, float("nan"), None, float("inf")], pa.float32()),
        b=pa.array([True, False, None, True]),
        l=pa.array([[1, 2], [], None, [2, None]], pa.list_(pa.int64())),
        x=pa.array([[1.0, 2.0], [3.0, 4.0], None, [5.0, 6.0]], pa.list_(pa.float32(), 2)),
        s=["a", "b", "c", "d"],
        t=pa.array([1, 2, 3, 4], pa.timestamp("s")),
    )
    found = measured(tmp_path)
    c = found.columns
    assert found.is_whole and found.rows == 4 and not found.unusable
    kinds = {name: column.kind for name, column in c.items()}
    assert " ".join(kinds[name] for name in "iufblxst") == "integer integer float bool integers floats text time"
    assert (c["i"].low, c["i"].high, c["i"].nulls, c["i"].total_nulls, c["i"].distinct) == (-1, 5, 1, 1, 2)
    assert (c["u"].low, c["u"].high, c["u"].is_exact) == (3, 2**63 + 1, True)
    assert (c["f"].nulls, c["f"].total_nulls, c["f"].infinite, c["f"].values) == (2, 1, 1, 2)
    assert (c["b"].is_binary, c["b"].nulls) == (True, 1)
    l = c["l"]  # noqa: E741 - the column's name
    assert (l.mean_length, l.max_length, l.nulls, l.null_items, l.distinct, l.high) == (1.0, 2, 1, 1, 2, 2)
    assert l.total_nulls is None  # its footer counts empty lists as nulls
    assert (c["x"].mean_length, c["x"].nulls, c["x"].high) == (1.5, 1, 6.0)
    assert c["s"].rows == c["t"].rows == 0


def test_footers_bound_what_a_sample_misses(tmp_path):
    ids = np.full(5000, 7)
    ids[4321] = 999
    lists = [[int(i)] for i in ids]
    write(tmp_path / "a" / "x.parquet", i=ids, l=lists)
    write(tmp_path / "b" / "x.parquet", statistics=False, i=ids, l=lists)
    for name in "il":
        with_statistics = measured(tmp_path / "a", 64).columns[name]
        without = measured(tmp_path / "b", 64).columns[name]
        assert (with_statistics.high, with_statistics.is_exact, with_statistics.distinct) == (999, True, 1)
        assert (without.high, without.is_exact) == (7, False)
        both = profile(read_footers(str(tmp_path / "b")), 64, others=read_footers(str(tmp_path / "a"))).columns[name]
        assert (both.high, both.is_exact) == (999, False)
        whole = measured(tmp_path / "b").columns[name]
        assert (whole.high, whole.is_exact) == (999, True)


def test_bounds_of_the_other_splits_count(tmp_path):
    write(tmp_path / "train.parquet", i=[1, 2, 3])
    write(tmp_path / "test.parquet", i=[1, 50, None])
    others = read_footers(str(tmp_path / "test.parquet"))
    c = profile(read_footers(str(tmp_path / "train.parquet")), 100, others).columns["i"]
    assert (c.high, c.is_exact, c.nulls, c.total_nulls, c.has_nulls) == (50, True, 0, 1, True)


def test_a_sample_is_about_as_large_as_asked_for_and_spread_over_files_and_row_groups(tmp_path):
    for file in range(5):
        first = file * 20_000
        write(tmp_path / f"{file}.parquet", row_group_size=5000, row=np.arange(first, first + 20_000))
    for wanted in (1, 100, 3000, 40_000):
        found = measured(tmp_path, wanted)
        rows = found.sample["row"].to_numpy()
        assert 0.9 * wanted <= len(rows) <= 1.5 * wanted + 64
        assert len(np.unique(rows)) == len(rows) and not found.is_whole
        if wanted >= 100:
            assert set(rows // 5000) == set(range(20))
            assert abs(rows.mean() / 50_000 - 1) < 0.1
    assert measured(tmp_path, 100_000).is_whole


def test_long_lists_make_the_sample_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_rec.data.sampling._SAMPLE_BYTES", 8 * 50 * 300)
    write(tmp_path / "a.parquet", l=[list(range(50))] * 3000)
    assert 300 <= measured(tmp_path, 3000).sample.num_rows < 500


def test_columns_that_files_do_not_agree_on_are_unusable(tmp_path):
    write(tmp_path / "a.parquet", i=[1, 2], x=[1, 2], only=[1, 2], w=pa.array([1, 2], pa.int32()))
    write(tmp_path / "b.parquet", i=[3, 4], x=[1.5, 2.5], w=pa.array([3, 2**40], pa.int64()))
    pq.write_table(pa.Table.from_arrays([pa.array([1])] * 4, ["i", "i", "x", "w"]), tmp_path / "c.parquet")
    found = measured(tmp_path)
    assert set(found.unusable) == {"i", "x", "only"}
    assert "several times" in found.unusable["i"] and "c.parquet" in found.unusable["i"]
    assert "integer in" in found.unusable["x"] and "float in" in found.unusable["x"]
    assert "missing in 2 of 3 files" in found.unusable["only"]
    assert found.columns["w"].high == 2**40


@pytest.mark.parametrize("scale", [1, 10, 100])
def test_distinct_estimates_are_within_the_stated_factor(scale):
    rng = np.random.default_rng(0)
    population = rng.zipf(1.3, 100_000) % 50_000
    sample = rng.choice(population, 100_000 // scale, replace=False)
    truth = len(np.unique(population))
    estimate = estimate_distinct(sample, np.arange(len(sample)) // 100, scale)
    assert truth / np.sqrt(scale) <= estimate <= truth * np.sqrt(scale)
    if scale == 1:
        assert estimate == truth


def test_distinct_values_of_sorted_columns_are_not_underestimated():
    users = np.repeat(np.arange(20_000), 10)  # ten rows a user, one after the other
    runs = np.arange(0, len(users), 8000)
    rows = (runs[:, None] + np.arange(400)).ravel()
    assert estimate_distinct(users[rows], rows // 8000, len(users) / len(rows)) == pytest.approx(20_000, rel=0.05)


def test_moments_take_a_logarithm_of_skewed_counts_only(tmp_path):
    rng = np.random.default_rng(0)
    counts = np.floor(rng.lognormal(2, 1.5, 2000))
    normal = rng.normal(5, 2, 2000)
    both = rng.standard_t(1.5, 2000)
    missing = np.where(np.arange(2000) % 4 == 0, np.nan, counts)
    write(tmp_path / "a.parquet", counts=counts, normal=normal, both=both, missing=missing)
    found = measured(tmp_path)
    logs = np.log1p(counts)
    assert found.moments("counts") == ("log1p", pytest.approx(logs.mean()), pytest.approx(logs.std()))
    assert found.moments("normal") == ("none", pytest.approx(normal.mean()), pytest.approx(normal.std()))
    assert found.moments("both").transform == "none"
    partly = found.moments("missing")
    assert partly.mean == pytest.approx(logs[np.arange(2000) % 4 != 0].mean())
    assert np.log1p(partly.neutral) == pytest.approx(partly.mean)


def test_separation_finds_leaks_by_order_by_value_and_by_absence(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 4000)
    price = np.where(y == 1, rng.integers(1, 1000, 4000), 0).astype(float)
    price[y == 0] = np.nan
    write(
        tmp_path / "a.parquet",
        y=y,
        stars=np.where(y == 1, rng.integers(4, 6, 4000), rng.integers(1, 4, 4000)),
        code=np.where(y == 1, rng.choice([1, 5, 9], 4000), rng.choice([0, 4, 8], 4000)),
        price=price,
        noise=rng.integers(0, 5, 4000),
        weak=y + rng.normal(0, 1, 4000),
        unique=rng.permutation(4000),
        flag=y == 1,
        ones=np.ones(4000, int),
    )
    found = measured(tmp_path)
    s = {name: found.separation(name, "y") for name in found.columns}
    assert s["stars"] == s["code"] == s["price"] == s["flag"] == 0.5
    assert s["noise"] < 0.05 and s["unique"] < 0.05
    assert 0.2 < s["weak"] < 0.3  # AUC 0.76: normal with a distance of one standard deviation
    assert found.separation("stars", "ones") == 0


def test_a_damaged_row_group_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", i=np.random.default_rng(0).integers(0, 10**9, 5000))
    data = bytearray(path.read_bytes())
    data[100:3000] = b"\xff" * 2900
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.parquet: row group \d+ cannot be read"):
        measured(tmp_path)
