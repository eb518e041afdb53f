"""Delimited text files (csv, tsv), read block by block, plain or gzip; what is wrong in one is said with its line."""

from __future__ import annotations

import csv
import gzip
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
from numpy.typing import NDArray

from dist_rec.data.footers import DataError

BLOCK_BYTES = 4 << 20  # several are decoded ahead: 16 MiB blocks took 700 MB
_MAX_HEADER = 1 << 16
_SHOWN = 80  # characters of a bad value
_WORDS = {"int8": "a whole number", "int64": "a whole number", "double": "a number", "string": "text"}


def find(folder: Path, *names: str) -> Path:
    """The first of `names` that lies in `folder` or in its folder `data`, as it is or with .gz behind it.

    Raises DataError that lists what was looked for and what is there.
    """
    found = find_optional(folder, *names)
    if found is None:
        if not folder.is_dir():
            raise DataError(f"{folder}: is no folder; give the one that holds {' or '.join(names)}")
        there = sorted(p.name for place in (folder, folder / "data") if place.is_dir() for p in place.iterdir())
        shown = ", ".join(there[:20]) + (", ..." if len(there) > 20 else "")
        raise DataError(f"{folder}: has no {' or '.join(names)} (plain or .gz) in it, but {shown or 'nothing'}")
    return found


def find_optional(folder: Path, *names: str) -> Path | None:
    """As `find`, but None where there is no such file."""
    for name in names:
        for place in (folder, folder / "data"):
            for path in (place / name, place / f"{name}.gz"):
                if path.is_file():
                    return path
    return None


class Rows(NamedTuple):
    """Some rows of a file; row i of `batch` is line `first_line` + i."""

    path: Path
    first_line: int
    batch: pa.RecordBatch

    def column(self, name: str) -> pa.Array:
        """The column as an Arrow array."""
        return self.batch.column(name)

    def numbers(self, name: str) -> NDArray:
        """A column that has no nulls, as a numpy array."""
        return self.column(name).to_numpy(zero_copy_only=False)

    def binary(self, name: str) -> pa.Array:
        """A label of 0s and 1s as float32; anything else is an error."""
        column = self.column(name)
        self.refuse(pc.invert(pc.is_in(column, value_set=pa.array([0, 1], column.type))), name, "0 or 1")
        return column.cast(pa.float32())

    def hexadecimal(self, name: str) -> pa.Array:
        """A column of hexadecimal numbers of up to 15 digits as int64; nulls stay."""
        column = self.column(name)
        try:
            return pc.binary_join_element_wise("0x", column, "").cast(pa.int64())
        except pa.ArrowInvalid:
            is_good = pc.match_substring_regex(column, "^[0-9a-fA-F]{1,15}$")
            self.refuse(pc.invert(is_good), name, "a hexadecimal number of up to 15 digits")
            raise

    def refuse(self, bad: pa.Array | NDArray[np.bool_], name: str, expected: str) -> None:
        """Raises DataError for the first row that is `bad`, which is no null."""
        places = np.flatnonzero(pc.fill_null(pa.array(bad, pa.bool_()), False).to_numpy(zero_copy_only=False))
        if len(places):
            value = self.column(name)[int(places[0])].as_py()
            self.fail(int(places[0]), f"column '{name}' is {_short(value)}; expected {expected}")

    def fail(self, row: int, text: str) -> NoReturn:
        """Raises DataError for row `row` of the batch."""
        raise DataError(f"{self.path}: line {self.first_line + row}: {text}")


@dataclass(frozen=True)
class TextFile:
    """A delimited text file.

    Attributes:
        path: plain or gzip, whatever it is called.
        columns: the columns to read, with their types.
        names: every column of a file without a header, in order; None: the first line names them, in any order, and may
            name more.
        empty: the columns to read that may be empty; empty is null.
        quotes: whether "a,b" is one value.
    """

    path: Path
    columns: Mapping[str, pa.DataType]
    names: Sequence[str] | None = None
    empty: Collection[str] = ()
    delimiter: str = ","
    quotes: bool = False
    encoding: str = "utf-8"

    def batches(self) -> Iterator[Rows]:
        """All rows in order; holds one block of text.

        Raises:
            DataError: with the file, the line, what was found and what was expected.
        """
        names = self._check_header() if self.names is None else list(self.names)
        if self.names is not None:
            _first_line(self.path, self.encoding)
        line = 1 if self.names is not None else 2
        found_any = False
        for batch in self._read(names, skipped=line - 1):
            rows = Rows(self.path, line, batch)
            for name in self.columns:
                if name not in self.empty and batch.column(name).null_count:
                    place = int(np.flatnonzero(batch.column(name).is_null().to_numpy(zero_copy_only=False))[0])
                    rows.fail(place, f"column '{name}' is empty; every row has one")
            yield rows
            line += batch.num_rows
            found_any = found_any or batch.num_rows > 0
        if not found_any:
            raise DataError(f"{self.path}: has a header and no rows; download it again")

    def _check_header(self) -> list[str]:
        first = _first_line(self.path, self.encoding)
        names = next(csv.reader([first], delimiter=self.delimiter), []) if self.quotes else first.split(self.delimiter)
        missing = [name for name in self.columns if name not in names]
        if missing:
            text = f"line 1: expected a header with the columns {', '.join(self.columns)}; "
            raise DataError(f"{self.path}: {text}{', '.join(missing)} not found in {_short(first)}")
        return names

    def _read(self, names: list[str], skipped: int) -> Iterator[pa.RecordBatch]:
        try:
            yield from self._decode(names, skipped, threads=True)
        except DataError:
            for _ in self._decode(names, skipped, threads=False):  # on one thread pyarrow tells the line
                pass
            raise

    def _decode(self, names: list[str], skipped: int, threads: bool) -> Iterator[pa.RecordBatch]:
        lines = skipped
        try:
            with open_text(self.path) as source:
                reader = pacsv.open_csv(
                    source,
                    read_options=pacsv.ReadOptions(
                        use_threads=threads,
                        column_names=names,
                        skip_rows=skipped,
                        block_size=BLOCK_BYTES,
                        encoding=self.encoding,
                    ),
                    parse_options=pacsv.ParseOptions(
                        delimiter=self.delimiter,
                        quote_char='"' if self.quotes else False,
                        ignore_empty_lines=False,  # they would shift the numbers of the lines behind them
                    ),
                    convert_options=pacsv.ConvertOptions(
                        column_types=dict(self.columns),
                        include_columns=list(self.columns),
                        null_values=[""],
                        strings_can_be_null=True,
                    ),
                )
                for batch in reader:
                    yield batch
                    lines += batch.num_rows
        except pa.ArrowInvalid as error:
            raise DataError(f"{self.path}: {_said(str(error), names, lines)}") from error
        except OSError as error:
            raise _damaged(self.path, lines, error) from error


def open_text(path: Path) -> pa.NativeFile:
    """The bytes of a file, decompressed if they are gzip."""
    return pa.input_stream(str(path), compression="gzip" if _is_gzip(path) else None)


def count_lines(path: Path) -> int:
    """How many lines the file has; the last one need not be ended."""
    lines, last = 0, b"\n"
    try:
        with open_text(path) as source:
            while block := source.read(BLOCK_BYTES):
                lines, last = lines + block.count(b"\n"), block[-1:]
    except OSError as error:
        raise _damaged(path, lines, error) from error
    return lines + (last != b"\n")


def _is_gzip(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); correct its permissions") from error
    if not start:
        raise DataError(f"{path}: is empty (0 bytes); download it again")
    if start == b"PK\x03\x04":
        raise DataError(f"{path}: is a zip archive; unpack it first")
    return start[:2] == b"\x1f\x8b"


def _first_line(path: Path, encoding: str) -> str:
    try:
        with gzip.open(path, "rb") if _is_gzip(path) else path.open("rb") as file:
            line = file.readline(_MAX_HEADER)
    except (EOFError, OSError) as error:
        raise _damaged(path, 0, error) from error
    if not line:
        raise DataError(f"{path}: holds no line at all; download it again")
    try:
        return line.decode("utf-8-sig" if encoding == "utf-8" else encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: line 1 is no text ({error.reason}); is this the right file?") from error


def _damaged(path: Path, lines: int, error: Exception) -> DataError:
    text = f"cannot be read beyond line {lines} or soon after it ({error}): it is cut short or damaged"
    return DataError(f"{path}: {text}; download it again")


def _said(error: str, names: list[str], lines: int) -> str:
    """pyarrow's complaint, with the line first and the name of the column."""
    if match := re.match(r"CSV parse error: Row #(\d+): Expected (\d+) columns, got (\d+): (.*)", error, re.DOTALL):
        line, expected, found, text = match.groups()
        return f"line {line}: expected {expected} fields, found {found}: {_short(text)}; is the file whole?"
    if match := re.match(r"In CSV column #(\d+): Row #(\d+): CSV conversion error to (\S+): (.*)", error, re.DOTALL):
        column, line, kind, text = match.groups()
        return f"line {line}: column '{names[int(column)]}': {text}; expected {_WORDS.get(kind, kind)}"
    return f"after line {lines}: {_short(error)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
