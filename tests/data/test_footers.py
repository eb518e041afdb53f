"""Which files a path names, and what is wrong with them."""

import urllib.parse
from dataclasses import replace

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from dist_rec.data.footers import (
    DataError,
    check_columns,
    find_files,
    fingerprint,
    open_file,
    read_footers,
    secret_problem,
)
from dist_rec.data.schema import DenseColumn, GroupColumn, LabelColumn, Schema, SparseColumn, WeightColumn


def write(path, rows=3, row_group_size=2, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": pa.array(range(rows), pa.int64()), **columns}), path, row_group_size=row_group_size)


def test_file_folder_glob_and_uri_name_the_same_files(tmp_path):
    for name in ("b/2.parquet", "a.parquet", "_temporary/x.parquet", ".hidden.parquet", "notes.txt"):
        write(tmp_path / name)
    expected = [str(tmp_path / "a.parquet"), str(tmp_path / "b/2.parquet")]
    assert find_files(str(tmp_path)) == expected
    assert find_files(f"{tmp_path}/**/[a2].parquet") == expected
    assert find_files(f"file://{tmp_path}") == expected
    assert find_files(expected[0]) == expected[:1]
    assert [f.row_group_rows for f in read_footers(str(tmp_path))] == [(2, 1), (2, 1)]


@pytest.mark.parametrize("options", ["", "?endpoint_override=http://minio:9000/x&scheme=http"])
def test_files_of_a_uri_keep_its_account_host_and_options(tmp_path, monkeypatch, options):
    for name in ("cont/train/a.parquet", "cont/train/day=1/b c.parquet"):
        write(tmp_path / name)

    def resolve(uri):
        """As Azure names things: the container stands before the host, and first in the file system's paths."""
        parts = urllib.parse.urlsplit(uri)
        assert (parts.netloc, parts.query) == ("cont@acct.dfs:8020", options[1:])
        tree = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
        return tree, parts.username + urllib.parse.unquote(parts.path)

    monkeypatch.setattr("dist_rec.data.footers._file_system", resolve)
    base = "abfs://cont@acct.dfs:8020/train"
    expected = [f"{base}/a.parquet{options}", f"{base}/day=1/b%20c.parquet{options}"]
    assert find_files(f"{base}{options}") == find_files(f"{base}/{options}") == expected
    assert find_files(f"{base}/*.parquet{options}") == find_files(f"{base[:-2]}*{options}") == expected
    assert find_files(f"{base}/day=*/*{options}") == expected[1:]
    assert find_files(expected[1]) == expected[1:]
    assert [open_file(path).metadata.num_rows for path in expected] == [3, 3]
    footers = read_footers(f"{base}{options}")
    assert [footer.path for footer in footers] == expected
    others = [replace(footer, path=footer.path.partition("?")[0]) for footer in footers]
    assert fingerprint(footers) == fingerprint(others)  # other options, such as a new key, are the same data


def test_nothing_matches(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        read_footers(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"looked from /"):
        read_footers("no/such/folder")
    with pytest.raises(DataError, match=r"no \*.parquet file"):
        read_footers(str(tmp_path))
    with pytest.raises(DataError, match="matches no file"):
        read_footers(str(tmp_path / "*.parquet"))
    with pytest.raises(DataError, match="not a URI"):
        read_footers("nonsense://x")


@pytest.mark.parametrize(
    "uri",
    [
        "s3://key:pass@bucket/train",
        "s3://key:pass/word+x@bucket/train?region=x",
        "s3://key:pass%2Fword@bucket/train",
        "s3://bucket/train?endpoint_override=http://key:pass@minio:9000",
        "s3://bucket/train?region=x&secret_key=pass",
        "abfs://container@account/train?client%5FSecret=pass",
    ],
)
def test_a_uri_with_a_secret_is_refused_without_repeating_it(uri: str) -> None:
    with pytest.raises(
        DataError, match=r"the path of the data is a URI with a secret in it.*AWS_SECRET_ACCESS_KEY"
    ) as e:
        read_footers(uri)
    assert "pass" not in str(e.value)


@pytest.mark.parametrize(
    "path",
    [
        "s3://bucket/a:b@c",
        "s3://bucket/train?endpoint_override=http://minio:9000/x@y",
        "hdfs://user@host:9000/x",
        "hdfs://host:9000/a:b@c",
        "abfs://container@account/key=1/x",
        "key:pass@folder?secret=x",
    ],
)
def test_a_path_without_a_secret_is_not_taken_for_one(path: str) -> None:
    assert secret_problem(path) is None


def test_broken_files_are_named(tmp_path):
    write(tmp_path / "good.parquet")
    whole = (tmp_path / "good.parquet").read_bytes()
    for content, message in ((b"", "empty"), (whole[: len(whole) // 2], "cut short"), (b"id,label\n1,2\n", "not Parq")):
        (tmp_path / "bad.parquet").write_bytes(content)
        with pytest.raises(DataError, match=rf"bad.parquet: .*{message}"):
            read_footers(str(tmp_path))


def test_a_damaged_footer_is_named(tmp_path):
    """Whatever bytes of the footer are wrong: an error that names the file, or none."""
    write(tmp_path / "good.parquet")
    whole = (tmp_path / "good.parquet").read_bytes()
    size = int.from_bytes(whole[-8:-4], "little")
    refused = []
    for at in range(len(whole) - 8 - size, len(whole), 7):
        (tmp_path / "bad.parquet").write_bytes(whole[:at] + b"\xff" * 7 + whole[at + 7 :])
        try:
            read_footers(str(tmp_path / "bad.parquet"))
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert all("bad.parquet: " in text and "write it again or remove it" in text for text in refused)


def test_what_the_storage_refuses_is_named(monkeypatch):
    class Refusing:
        def get_file_info(self, path):
            raise OSError("When getting information for key: AWS Error ACCESS_DENIED")

    monkeypatch.setattr("dist_rec.data.footers._file_system", lambda path: (Refusing(), "bucket/train"))
    for call in (read_footers, open_file):
        with pytest.raises(DataError, match=r"s3://bucket/train: cannot be read .*ACCESS_DENIED.*credentials"):
            call("s3://bucket/train")


def test_files_without_rows(tmp_path):
    write(tmp_path / "0.parquet", rows=0)
    with pytest.raises(DataError, match="no rows at all"):
        read_footers(str(tmp_path))
    write(tmp_path / "1.parquet")
    assert sum(sum(f.row_group_rows) for f in read_footers(str(tmp_path))) == 3


def test_fingerprint_sees_names_and_sizes_but_not_the_folder(tmp_path):
    for folder in ("x", "y"):
        write(tmp_path / folder / "a.parquet")
    x, y = (fingerprint(read_footers(str(tmp_path / folder))) for folder in "xy")
    assert x == y and x["rows"] == 3 and x["row_groups"] == 2
    write(tmp_path / "y" / "a.parquet", row_group_size=1)
    assert fingerprint(read_footers(str(tmp_path / "y"))) != x
    (tmp_path / "x" / "a.parquet").rename(tmp_path / "x" / "b.parquet")
    assert fingerprint(read_footers(str(tmp_path / "x"))) != x


def test_all_column_problems_come_in_one_error(tmp_path):
    columns = {
        "click": pa.array(["0", "1", "1"]),
        "price": pa.array([1, 2, 3], pa.decimal128(5)),
        "user_id": pa.array(["a", "b", "c"]),
        "tags": pa.array([1, 2, 3]),
        "genre": pa.array([[1], [2], [3]]),
        "tag_weights": pa.array([["x"], [], []]),
        "domain": pa.array([0.5, 1.0, 2.0]),
    }
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet", **columns)
    schema = Schema(
        labels={"click": LabelColumn()},
        dense={"price": DenseColumn()},
        sparse={
            "user_id": SparseColumn(10),
            "tags": SparseColumn(10, multi=True, weights="tag_weights"),
            "genre": SparseColumn(10),
            "item_idd": SparseColumn(10),
            "domains": SparseColumn(10),
        },
        groups={"domain": GroupColumn("domain"), "scaled": GroupColumn("click", scale=10)},
        weight=WeightColumn("nothing_like_it"),
    )
    with pytest.raises(DataError) as error:
        check_columns(read_footers(str(tmp_path)), schema)
    text = str(error.value)
    assert "11 problems" in text and "a.parquet and 1 more of 2 files" in text
    for part in (
        "'click' (label) is string; expected a float, integer or bool",
        "'price' (dense) is decimal128(5, 0)",
        "'user_id' (sparse) is string; ids are integers; encode as int64",
        "'tags' (sparse) is int64; expected a list of integers, as multi is true; set multi: false",
        "'genre' (sparse) is list<element: int64>; expected one integer per row; set multi: true",
        "'tag_weights' (weights of 'tags') is list<element: string>",
        "'item_idd' (sparse) is missing",
        "'domains' (sparse) is missing; did you mean 'domain'?",
        "'domain' (group 'domain') is double; expected an integer; set scale",
        "'click' (group 'scaled') is string; expected a float, integer or bool",
        "'nothing_like_it' (sample weight) is missing",
    ):
        assert part in text, part


def test_fitting_types_pass(tmp_path):
    columns = {
        "click": pa.array([True, False, True]),
        "price": pa.array([1, 2, 3], pa.uint8()),
        "tags": pa.array([[1], [], None], pa.large_list(pa.int32())),
        "fixed": pa.array([[1, 2]] * 3, pa.list_(pa.int64(), 2)),
        "revenue": pa.array([0.5, 1.5, 2.0]),
    }
    write(tmp_path / "a.parquet", **columns)
    schema = Schema(
        labels={"click": LabelColumn()},
        dense={"price": DenseColumn()},
        sparse={"id": SparseColumn(9), "tags": SparseColumn(9, multi=True), "fixed": SparseColumn(9, multi=True)},
        groups={"revenue": GroupColumn("revenue", scale=100)},
    )
    check_columns(read_footers(str(tmp_path)), schema)
