"""Delimited text: blocks, line numbers, and the message for everything that can be wrong with a file."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dist_rec.data import text_files
from dist_rec.data.footers import DataError
from dist_rec.data.text_files import TextFile, count_lines, find

HEADER = b"a,b,c\n"
GOOD = HEADER + b"1,2,x\n" * 3
ZIPPED = gzip.compress(HEADER + b"".join(b"%d,%d,x\n" % (i, i * 7919) for i in range(5000)))


def read(path: Path, data: bytes, **options: Any) -> list[dict[str, Any]]:
    """The rows of `data`, with their lines."""
    path.write_bytes(data)
    file = TextFile(path, **({"columns": {"c": pa.string(), "b": pa.int64()}} | options))
    found = []
    for rows in file.batches():
        found += [row | {"line": rows.first_line + i} for i, row in enumerate(rows.batch.to_pylist())]
    return found


@pytest.fixture(autouse=True, params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each test runs on one core and on several: pyarrow says less of an error that one of several threads met."""
    before = pa.cpu_count()
    pa.set_cpu_count(request.param)
    yield
    pa.set_cpu_count(before)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def test_columns_by_name_in_any_order_and_lines_over_blocks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 256)
    data = b"c,more,b\n" + b"".join(b"x%d,,%d\n" % (i, i) for i in range(100))
    assert read(path, data) == [{"c": f"x{i}", "b": i, "line": i + 2} for i in range(100)]
    assert read(path, gzip.compress(data)) == read(path, data)
    assert read(path, data.rstrip(b"\n")) == read(path, data), "the last line need not be ended"
    assert read(path, data.replace(b"\n", b"\r\n")) == read(path, data)


def test_without_header_with_quotes_empty_values_and_encodings(path: Path) -> None:
    names = ["a", "b", "c"]
    assert read(path, b"1\t2\tx y\n", names=names, delimiter="\t") == [{"c": "x y", "b": 2, "line": 1}]
    assert read(path, b'a,b,c\n1,2,"x,y"\n', quotes=True) == [{"c": "x,y", "b": 2, "line": 2}]
    assert read(path, b'a,b,c\n1,2,"x\n') == [{"c": '"x', "b": 2, "line": 2}]
    assert read(path, HEADER + b"1,,\n", empty={"b", "c"}) == [{"c": None, "b": None, "line": 2}]
    assert read(path, HEADER + b"1,2,\xe9\n", encoding="latin-1") == [{"c": "é", "b": 2, "line": 2}]
    assert read(path, b"\xef\xbb\xbfc,b\nx,2\n") == [{"c": "x", "b": 2, "line": 2}]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty (0 bytes); download it again"),
        (gzip.compress(b""), "holds no line at all"),
        (HEADER, "has a header and no rows"),
        (b"PK\x03\x04....", "is a zip archive; unpack it first"),
        (b"a,x,c\n1,2,3\n", "line 1: expected a header with the columns c, b; b not found in 'a,x,c'"),
        (b"a;b;c\n1;2;3\n", "c, b not found in 'a;b;c'"),
        (b"1,2,3\n1,2,3\n", "c, b not found in '1,2,3'"),
        (b"<html>\n", "c, b not found in '<html>'"),
        (b"\x80\x81\n", "line 1 is no text"),
        (GOOD + b"1,2\n", "line 5: expected 3 fields, found 2: '1,2'; is the file whole?"),
        (GOOD + b"1", "line 5: expected 3 fields, found 1: '1'"),
        (GOOD + b"1,2,3,4\n", "line 5: expected 3 fields, found 4"),
        (GOOD + b"1,2.5,x\n", "line 5: column 'b': invalid value '2.5'; expected a whole number"),
        (GOOD + b"1,,x\n", "line 5: column 'b' is empty; every row has one"),
        (GOOD + b"\n1,2,x\n", "line 5: column 'c' is empty"),
        (GOOD + b"1,2,\xff\n", "line 5: column 'c': invalid UTF8 data; expected text"),
        (ZIPPED[: len(ZIPPED) // 2], "beyond line 1 or soon after it (Truncated compressed stream): it is cut short"),
        (ZIPPED[:20], "(Compressed file ended before the end-of-stream marker was reached): it is cut short"),
        (ZIPPED[:-20] + b"x" * 20, "it is cut short or damaged; download it again"),
    ],
)
def test_what_is_wrong_is_said_with_the_file_and_the_line(path: Path, data: bytes, message: str) -> None:
    with pytest.raises(DataError) as error:
        read(path, data)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


def test_lines_of_late_blocks_are_told_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 256)
    rows = b"1,2,x\n" * 500
    with pytest.raises(DataError, match="line 502: expected 3 fields, found 1"):
        read(path, HEADER + rows + b"1\n" + rows)
    with pytest.raises(DataError, match=r"line 502: column 'b'.*'y'; expected a whole number"):
        read(path, HEADER + rows + b"1,y,x\n" + rows)
    with pytest.raises(DataError, match="line 502: column 'c' is empty"):
        read(path, HEADER + rows + b"1,2,\n" + rows)


def test_values_that_a_data_set_refuses(path: Path) -> None:
    path.write_bytes(b"h,y\n1fbe01fe,0\n,1\nxyz,2\n")
    (rows,) = TextFile(path, {"h": pa.string(), "y": pa.int8()}, empty={"h"}).batches()
    with pytest.raises(DataError, match=r"file: line 4: column 'h' is 'xyz'; expected a hexadecimal number"):
        rows.hexadecimal("h")
    with pytest.raises(DataError, match=r"file: line 4: column 'y' is 2; expected 0 or 1"):
        rows.binary("y")
    path.write_bytes(b"h,y\n1fbe01fe,0\n,1\n")
    (rows,) = TextFile(path, {"h": pa.string(), "y": pa.int8()}, empty={"h"}).batches()
    assert rows.hexadecimal("h").to_pylist() == [0x1FBE01FE, None]
    assert rows.binary("y").to_pylist() == [0.0, 1.0]


def test_files_are_found_plain_gzipped_and_in_data(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("one", "two.gz", "data/three"):
        (tmp_path / name).write_text("x")
    found = [find(tmp_path, name) for name in ("one", "two", "three")]
    assert [p.relative_to(tmp_path).as_posix() for p in found] == ["one", "two.gz", "data/three"]
    assert find(tmp_path, "zero", "one") == tmp_path / "one"
    with pytest.raises(DataError, match=r"has no four or five \(plain or .gz\) in it, but data, one, three, two.gz"):
        find(tmp_path, "four", "five")
    with pytest.raises(DataError, match="nowhere: is no folder; give the one that holds four"):
        find(tmp_path / "nowhere", "four")


def test_count_lines(path: Path) -> None:
    for data, lines in ((b"a\nb\n", 2), (b"a\nb", 2), (gzip.compress(b"a\n" * 70_000), 70_000)):
        path.write_bytes(data)
        assert count_lines(path) == lines
    path.write_bytes(ZIPPED[: len(ZIPPED) // 2])
    with pytest.raises(DataError, match="is cut short or damaged"):
        count_lines(path)
