"""One slice of a row group -> numpy: each policy, each refusal, and Arrow arrays that are sliced and have nulls."""

import numpy as np
import pyarrow as pa
import pytest

from dist_rec.data.footers import DataError
from dist_rec.data.ids import PolicyCounts, hash_ids
from dist_rec.data.parquet import Columns, Place, convert, id_dtype
from dist_rec.data.schema import DenseColumn, GroupColumn, LabelColumn, Schema, SparseColumn, WeightColumn

LIST = pa.list_(pa.int64())


def converted(column, array, name="x", more=None):
    """`array` preceded and followed by rows that are cut off, converted as one column; (Columns, counts)."""
    array = array if isinstance(array, pa.Array) else pa.array(array)
    sections = {DenseColumn: "dense", SparseColumn: "sparse", LabelColumn: "labels"}
    schema = Schema(labels={}, sparse={})
    if isinstance(column, GroupColumn):
        schema.groups["g"] = column
    elif isinstance(column, WeightColumn):
        schema.weight = column
    else:
        setattr(schema, sections[type(column)], {name: column})
    table = pa.table({name: array, **(more or {})})
    junk = table.take(pa.array([0] * 3)) if len(table) else table
    table = pa.concat_tables([junk, table, junk]).combine_chunks().slice(len(junk), len(table))
    columns, counts = Columns.empty(schema, len(table)), PolicyCounts()
    rows = slice(100, 100 + len(table))
    convert(table, schema, columns, 0, counts, Place("part.parquet", 2, 1000, rows))
    return columns, dict(counts)


def ids(column, array, more=None):
    """(ids or lists of ids by row, counts)."""
    columns, counts = converted(column, array, more=more)
    if "x" not in columns.ragged:
        return columns.fixed[0].tolist(), counts
    bags = columns.ragged["x"][0]
    parts = np.split(bags.values, np.cumsum(bags.lengths)[:-1]) if len(bags.lengths) else []
    return [part.tolist() for part in parts], counts


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
def test_ids_of_every_integer_type(dtype):
    assert ids(SparseColumn(100), np.array([0, 99, 5], dtype)) == ([0, 99, 5], {})
    assert ids(SparseColumn(1000), np.array([0, 99, 5], dtype)) == ([0, 99, 5], {})
    with pytest.raises(DataError, match=r"id 100 is outside 0..99"):
        ids(SparseColumn(100), np.array([0, 100], dtype))
    if dtype.startswith("i"):
        for size in (100, 1000):
            with pytest.raises(DataError, match=r"id -1 is outside"):
                ids(SparseColumn(size), np.array([0, -1], dtype))
            assert ids(SparseColumn(size, out_of_range="modulo"), np.array([3, -1], dtype))[0] == [3, size - 1]


def test_out_of_range_policies():
    values = [3, -1, 10, 2**40, 9]
    assert ids(SparseColumn(10, out_of_range="modulo"), values) == (
        [3, 9, 0, 2**40 % 10, 9],
        {"x.out_of_range=modulo": 3},
    )
    assert ids(SparseColumn(10, out_of_range="reserved"), values) == (
        [3, 10, 10, 10, 9],
        {"x.out_of_range=reserved": 3},
    )
    hashed, counts = ids(SparseColumn(10, out_of_range="hash"), values)
    assert counts == {"x.out_of_range=hash": 3} and [hashed[0], hashed[4]] == [3, 9]
    assert all(0 <= i < 10 for i in hashed)
    assert hashed[1:4] == hash_ids(np.array(values[1:4]), 10).tolist()


def test_error_names_everything():
    with pytest.raises(DataError) as error:
        ids(SparseColumn(10, table="items"), [1, 2, 77])
    text = str(error.value)
    assert (
        "'x' (sparse, table 'items' of 10 ids): id 77 is outside 0..9 at row 1102 of part.parquet (row group 2)" in text
    )
    assert "set out_of_range to modulo, hash or reserved" in text


def test_hash_is_the_finaliser_of_splitmix64_and_spreads():
    mask = 2**64 - 1
    for value in (1, 2**63, 123456789):
        x = value
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        assert hash_ids(np.array([value], np.uint64), 1009)[0] == (x ^ (x >> 31)) % 1009
    counts = np.bincount(hash_ids(np.arange(100_000) * 1024, 64), minlength=64)
    assert counts.min() > 1300 and counts.max() < 1850
    assert ids(SparseColumn(50, out_of_range="hash"), pa.array([2**64 - 1], pa.uint64()))[0][0] < 50


def test_null_policies_of_single_ids():
    values = [1, None, 3]
    with pytest.raises(DataError, match=r"null at row 1101 .*set on_null to"):
        ids(SparseColumn(10), values)
    assert ids(SparseColumn(10, on_null="fill", fill=7), values) == ([1, 7, 3], {"x.null=fill": 1})
    assert ids(SparseColumn(10, on_null="reserved"), values) == ([1, 10, 3], {"x.null=reserved": 1})
    assert ids(SparseColumn(10, on_null="empty"), values) == ([[1], [], [3]], {"x.null=empty": 1})
    assert ids(SparseColumn(10, on_null="empty"), [1, 2]) == ([[1], [2]], {})
    with pytest.raises(DataError, match=r"id 30 .* row 1102"):
        ids(SparseColumn(10, on_null="empty"), [1, None, 30])


def test_lists_with_nulls():
    array = pa.array([[1, 2], None, [], [3, None, 4]], LIST)
    with pytest.raises(DataError, match="null in list at row 1103"):
        ids(SparseColumn(10, multi=True), array)
    with pytest.raises(DataError, match="null at row 1101"):
        ids(SparseColumn(10, multi=True), pa.array([[1], None], LIST))
    expected = {
        "fill": [[1, 2], [9], [], [3, 9, 4]],
        "empty": [[1, 2], [], [], [3, 4]],
        "reserved": [[1, 2], [10], [], [3, 10, 4]],
    }
    for policy, lists in expected.items():
        result = (lists, {f"x.null={policy}": 1, f"x.null_in_list={policy}": 1})
        assert ids(SparseColumn(10, multi=True, on_null=policy, fill=9), array) == result
        large = array.cast(pa.large_list(pa.int64()))
        assert ids(SparseColumn(10, multi=True, on_null=policy, fill=9), large) == result


def test_null_list_over_values_is_still_null():
    array = pa.ListArray.from_arrays(
        pa.array([0, 2, 4, 5]), pa.array([1, 2, 3, 4, 5]), mask=pa.array([False, True, False])
    )
    assert ids(SparseColumn(10, multi=True, on_null="empty"), array)[0] == [[1, 2], [], [5]]


def test_list_rows_of_errors_and_truncation():
    array = pa.array([[1, 2, 3], [], [4, 50], [6]], LIST)
    with pytest.raises(DataError, match=r"id 50 .* row 1102"):
        ids(SparseColumn(10, multi=True), array)
    kept, counts = ids(SparseColumn(10, multi=True, max_length=1), array)
    assert kept == [[1], [], [4], [6]] and counts == {"x.max_length=dropped": 3}
    fixed_size = pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2))
    assert ids(SparseColumn(10, multi=True), fixed_size)[0] == [[1, 2], [3, 4]]


def test_weights_per_id():
    array = pa.array([[1, 2, 3], None, [4, None]], LIST)
    weights = pa.array([[0.1, 0.2, 0.3], None, [0.4, 0.5]], pa.list_(pa.float32()))
    column = SparseColumn(10, multi=True, weights="w", on_null="fill", fill=9, max_length=2)
    bags = converted(column, array, more={"w": weights})[0].ragged["x"][0]
    assert bags.values.tolist() == [1, 2, 9, 4, 9]
    np.testing.assert_allclose(bags.weights, [0.1, 0.2, 1, 0.4, 0.5], rtol=1e-6)
    column.on_null = "empty"
    bags = converted(column, array, more={"w": weights})[0].ragged["x"][0]
    np.testing.assert_allclose(bags.weights, [0.1, 0.2, 0.4], rtol=1e-6)
    for bad, message in (([[0.1], None, [0.4, 0.5]], "3 ids but 1 weights in 'w' at row 1100"),
                         ([[0.1, 0.2, 0.3], None, [0.4, None]], r"weights of 'x'\): null at row 1102"),
                         ([[0.1, 0.2, 0.3], None, [float("nan"), 1.0]], "nan at row 1102")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            converted(column, array, more={"w": pa.array(bad, pa.list_(pa.float32()))})


def test_dense_fill_transform_standardise():
    column = DenseColumn(on_null="fill", fill=np.e - 1, transform="log1p", mean=0.5, std=2.0)
    for dtype in (pa.float32(), pa.float64()):
        columns, counts = converted(column, pa.array([0.0, None, float("nan"), -(np.e - 1)], dtype))
        np.testing.assert_allclose(columns.dense[0], [-0.25, 0.25, 0.25, -0.75], rtol=1e-5)
        assert counts == {"x.null=fill": 2}
    assert converted(DenseColumn(), [True, False])[0].dense[0].tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log1p_of_a_long_column_does_not_depend_on_where_a_number_stands(dtype):
    """Of several tiles, some with negative numbers: the order of rows and the ranks must not change what is trained."""
    column = DenseColumn(transform="log1p")
    x = np.random.default_rng(0).lognormal(1, 3, 40_000).astype(dtype)
    x[20_000:22_000] *= -1
    whole = converted(column, x)[0].dense[0]
    np.testing.assert_allclose(whole, np.sign(x) * np.log1p(np.abs(x)), rtol=1e-6)
    for start, stop in ((0, 1), (3, 20), (16_383, 16_385), (19_999, 40_000)):
        assert np.array_equal(converted(column, x[start:stop])[0].dense[0], whole[start:stop])


def test_dense_in_64_bit_keeps_the_digits_of_time_stamps():
    stamps = np.array([1_700_000_000, 1_700_000_010])
    for array in (stamps, stamps.astype(np.float64)):
        assert converted(DenseColumn(mean=1_700_000_000, std=10), array)[0].dense[0].tolist() == [0, 1]


def test_dense_refusals():
    for bad, message in (
        (None, "null or NaN at row 1101"),
        (float("nan"), "null or NaN"),
        (float("inf"), "inf is not fin"),
    ):
        with pytest.raises(DataError, match=rf"'x' \(dense\): .*{message}"):
            converted(DenseColumn(), pa.array([1.0, bad]))
    with pytest.raises(DataError, match="1e\\+300 does not fit float32"):
        converted(DenseColumn(on_null="fill"), pa.array([1e300]))


def test_labels():
    assert converted(LabelColumn(), [0, 1, 1])[0].labels.tolist() == [[0, 1, 1]]
    assert converted(LabelColumn(kind="real"), [0.5, -2.0])[0].labels.tolist() == [[0.5, -2]]
    filled, counts = converted(LabelColumn(on_null="fill", fill=1), [0, None])
    assert filled.labels.tolist() == [[0, 1]] and counts == {"x.null=fill": 1}
    with pytest.raises(DataError, match=r"'x' \(label\): 2 is neither 0 nor 1 at row 1101 .*kind: real"):
        converted(LabelColumn(), [0, 2])
    with pytest.raises(DataError, match="null or NaN"):
        converted(LabelColumn(), [0.0, float("nan")])


def test_sample_weights_and_groups():
    assert converted(WeightColumn("x"), [0.0, 2.5])[0].weights.tolist() == [0, 2.5]
    assert converted(WeightColumn("x", on_null="fill"), [None, 2.5])[0].weights.tolist() == [1, 2.5]
    with pytest.raises(DataError, match=r"\(sample weight\): -1.0 is negative at row 1101"):
        converted(WeightColumn("x"), [0.0, -1.0])
    assert converted(GroupColumn("x"), [5, -(2**40)])[0].groups["g"].tolist() == [5, -(2**40)]
    filled, counts = converted(GroupColumn("x", on_null="fill"), [5, None])
    assert filled.groups["g"].tolist() == [5, -1] and counts == {"x.null=fill": 1}
    with pytest.raises(DataError, match="does not fit int64"):
        converted(GroupColumn("x"), pa.array([2**63], pa.uint64()))


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_groups_of_floats_are_floored_after_scaling(kind):
    def groups(array, **settings):
        columns, counts = converted(GroupColumn("x", **settings), array)
        return columns.groups["g"].tolist(), counts

    assert groups(pa.array([0.25, -0.25, 3.0, 0.0], kind), scale=10) == ([2, -3, 30, 0], {})
    missing = pa.array([1.5, None, float("nan")], kind)
    assert groups(missing, scale=2, on_null="fill") == ([3, -1, -1], {"x.null=fill": 2})
    assert groups(missing, scale=2, on_null="fill", fill=7)[0] == [3, 7, 7]
    for row, bad in ((1101, None), (1101, float("nan"))):
        with pytest.raises(DataError, match=rf"'x' \(group 'g'\): null or NaN at row {row}"):
            groups(pa.array([1.0, bad], kind), scale=2)
    for bad in (float("inf"), -1e30):
        with pytest.raises(DataError, match=r"times scale 2 does not fit int64 at row 1101 .*set a smaller scale"):
            groups(pa.array([1.0, bad], kind), scale=2, on_null="fill")


def test_a_scale_coarsens_integers_too():
    assert converted(GroupColumn("x", scale=0.5), [5, 4, -1])[0].groups["g"].tolist() == [2, 2, -1]


def test_groups_with_a_declared_number_of_values():
    declared = GroupColumn("x", num_ids=4)
    assert converted(declared, [3, 0])[0].groups["g"].tolist() == [3, 0]
    for bad in (4, -1):
        with pytest.raises(DataError, match=rf"\(group 'g'\): {bad} is outside 0..3 at row 1101 .*raise num_ids"):
            converted(declared, [0, bad])
    values = [3, 4, None, -7, 0]
    fill, counts = converted(GroupColumn("x", num_ids=4, out_of_range="fill", on_null="fill", fill=2), values)
    assert fill.groups["g"].tolist() == [3, 2, 2, 2, 0]
    assert counts == {"group 'g'.out_of_range=fill": 2, "x.null=fill": 1}
    column = GroupColumn("x", num_ids=4, out_of_range="reserved", on_null="reserved")
    reserved, counts = converted(column, values)
    assert reserved.groups["g"].tolist() == [3, 4, 4, 4, 0] and column.num_values == 5
    assert counts == {"group 'g'.out_of_range=reserved": 2, "x.null=reserved": 1}
    # a null is judged by on_null alone, whatever the file has in its place
    with pytest.raises(DataError, match="null or NaN"):
        converted(GroupColumn("x", num_ids=4, out_of_range="fill", fill=0), values)
    assert (declared.num_values, GroupColumn("x").num_values) == (4, None)


def test_id_dtype_is_one_for_all_tables():
    small, large = SparseColumn(2**31 - 1), SparseColumn(2**31 - 1, on_null="reserved")
    assert id_dtype(Schema(labels={}, sparse={"a": small})) == np.int32
    assert id_dtype(Schema(labels={}, sparse={"a": small, "b": large})) == np.int64
