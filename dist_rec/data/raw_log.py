"""What the raw files of a public data set hold, said alike for all sets: rows with columns, labels, and their split.

A file in `data/raw/` turns one set into a `RawLog`; `prepared.py` turns any `RawLog` into Parquet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_rec.data.footers import DataError
from dist_rec.data.text_files import Rows

LEFT_OUT = -1
TRAIN_SHARE, VALIDATION_SHARE = 0.8, 0.1


class Block(NamedTuple):
    """n rows. `split`: (n,) int8, index into the log's `splits`, LEFT_OUT for none. `columns`: Arrow arrays by name."""

    split: NDArray[np.int8]
    columns: dict[str, pa.Array]


@dataclass(frozen=True)
class RawLog:
    """The rows of a data set, in the order of its files.

    Attributes:
        about: in a line or two, what is split how, and what is left out; it is written into the config.
        blocks: makes a pass over all rows; called twice.
        labels: float32 columns.
        sparse: int64 columns (null: missing) or lists of int64, whose values become the ids 1, 2, ... in the order of
            the raw values; 0 is missing or unseen in training.
        numbered: columns whose values are the ids 0 .. n-1 already: name -> n.
        dense: columns of numbers; null: missing.
        others: labels that are written and not declared: a base config can be added to, but not taken from, and the
            published comparisons are on one label.
        groups: name of a group -> the column of integers that is written for it, as it is.
        splits: names of the splits, in the order of `Block.split`.
        rows: how many rows the published files have in all; None if that is not known.
    """

    about: str
    blocks: Callable[[], Iterator[Block]]
    labels: tuple[str, ...]
    sparse: tuple[str, ...]
    dense: tuple[str, ...] = ()
    numbered: Mapping[str, int] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    groups: Mapping[str, str] = field(default_factory=dict)
    splits: tuple[str, ...] = ("train", "validation", "test")
    rows: int | None = None


class Days(NamedTuple):
    """A split by time: the days up to `train` are training, those up to `validation` validation, later ones test."""

    train: int
    validation: int

    @classmethod
    def of(cls, rows: Mapping[int, int], path: Path) -> Days:
        """The days in order that hold at least 80 % of the rows, at least 90 %, and the rest; at least one day each.

        rows: day, any number that grows with time, -> its rows. path: named in the error if there are fewer than three.
        """
        days = sorted(rows)
        if len(days) < 3:
            text = f"has rows of {len(days)} day(s); training, validation and test need at least one each"
            raise DataError(f"{path}: {text}; is the file whole?")
        share = np.cumsum([rows[day] for day in days]) / sum(rows.values())
        train = min(int(np.searchsorted(share, TRAIN_SHARE)), len(days) - 3)
        validation = min(max(int(np.searchsorted(share, TRAIN_SHARE + VALIDATION_SHARE)), train + 1), len(days) - 2)
        return cls(days[train], days[validation])

    def split(self, day: NDArray) -> NDArray[np.int8]:
        """(n,) days -> (n,) 0, 1 or 2."""
        return (day > self.train).astype(np.int8) + (day > self.validation)


class Lookup:
    """A small table (users, videos) held in memory, to be joined to the rows of a log by its key."""

    def __init__(self, key: NDArray[np.int64], columns: Mapping[str, pa.Array]) -> None:
        """key: (n,) distinct. columns: (n,) each."""
        self._order = np.argsort(key, kind="stable")
        self._key, self._columns = key[self._order], dict(columns)

    @classmethod
    def read(cls, batches: Iterator[Rows], key: str) -> Lookup:
        """The whole of a file, with its columns as they are; DataError for a key that is there twice."""
        rows = list(batches)
        table = pa.Table.from_batches([r.batch for r in rows]).combine_chunks()
        keys = table[key].to_numpy()
        values, counts = np.unique(keys, return_counts=True)
        if (counts > 1).any():
            line = rows[0].first_line + int(np.flatnonzero(keys == values[counts > 1][0])[1])
            raise DataError(f"{rows[0].path}: line {line}: {key} {values[counts > 1][0]} is there for a second time")
        return cls(keys, {n: table[n].combine_chunks() for n in table.column_names if n != key})

    def replace(self, name: str, column: pa.Array) -> None:
        """Puts another (n,) column in the place of `name`, or adds it."""
        self._columns[name] = column

    def column(self, name: str) -> pa.Array:
        """The (n,) column, in the order of the file."""
        return self._columns[name]

    def to_integers(self, name: str, path: Path) -> None:
        """Makes a column of floats, which a file has where some values are missing, one of integers."""
        try:
            self._columns[name] = self._columns[name].cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: column '{name}' should hold whole numbers, but {error}") from error

    def take(self, keys: NDArray[np.int64], names: tuple[str, ...]) -> dict[str, pa.Array]:
        """The columns for (m,) keys; null for a key that is not there."""
        place = np.searchsorted(self._key, keys).clip(max=len(self._key) - 1)
        found = pa.array(self._order[place], mask=self._key[place] != keys)
        return {name: self._columns[name].take(found) for name in names}


def codes(column: pa.Array) -> pa.Array:
    """The values of a column of text, held whole, as 0, 1, ... in the order of their first row; null stays."""
    encoded = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return encoded.dictionary_encode().indices.cast(pa.int64())
