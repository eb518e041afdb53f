"""Criteo display ads: the Kaggle challenge (7 days) and the Terabyte click logs (24 days).

Files expected in RAW, plain or gzip (.gz behind the name):

- Kaggle: train.txt. Its test.txt has no labels and is not read.
- Terabyte: day_0, day_1, ... day_23, or any two or more of them.

No header; 40 fields separated by tabs: label (0 or 1), 13 integers, 26 hexadecimal categories; any but the label may
be empty. They become `label`, i1 .. i13 and c1 .. c26.

Split, by time, as the rows are in its order: Kaggle: the first 6/7 of the rows are training (six days of seven), the
rest is halved into validation and test; Terabyte: the last day is halved, the days before it are training. This is
the split of the DLRM code and of MLPerf.

Memory: only the ids. Kaggle has some 34 million in all, Terabyte hundreds of millions: see --max-ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dist_rec.data.footers import DataError
from dist_rec.data.raw_log import Block, RawLog
from dist_rec.data.text_files import Rows, TextFile, count_lines, find, find_optional

DENSE = tuple(f"i{i}" for i in range(1, 14))
SPARSE = tuple(f"c{i}" for i in range(1, 27))
KAGGLE_ROWS = 45_840_617


def open_log(raw: Path) -> RawLog:
    """The log in folder `raw`; reads its last file once, to know how many rows it has."""
    days = _days(raw)
    if days:
        *train, last = days
        half = count_lines(last) // 2
        cuts, about = (0, half), f"Criteo Terabyte, {len(days)} days; {last.name} is halved into validation and test."
        rows = None
    else:
        train, last = [], find(raw, "train.txt", "day_0")  # the latter for the message: there is none
        total = count_lines(last)
        first = total * 6 // 7
        cuts, about = (first, first + (total - first) // 2), "Criteo Kaggle; 6/7 of the rows, in order of time, train."
        rows = KAGGLE_ROWS
    return RawLog(about, lambda: _blocks(train, last, cuts), ("label",), SPARSE, DENSE, rows=rows)


def _days(raw: Path) -> list[Path]:
    names = {p.name.removesuffix(".gz") for place in (raw, raw / "data") for p in place.glob("day_*")}
    numbers = sorted(int(name[4:]) for name in names if re.fullmatch(r"day_\d+", name))
    if len(numbers) == 1:
        raise DataError(f"{raw}: has day_{numbers[0]} alone; the last day is for validation and test: add another day")
    found = [find_optional(raw, f"day_{number}") for number in numbers]
    return [path for path in found if path is not None]


def _blocks(train: list[Path], last: Path, cuts: tuple[int, int]) -> Iterator[Block]:
    """cuts: the rows of the last file at which validation and test begin."""
    for path in train:
        for rows in _read(path):
            yield _block(rows, np.zeros(rows.batch.num_rows, np.int8))
    for rows in _read(last):
        row = rows.first_line - 1 + np.arange(rows.batch.num_rows)
        yield _block(rows, (row >= cuts[0]).astype(np.int8) + (row >= cuts[1]))


def _read(path: Path) -> Iterator[Rows]:
    kinds = {"label": pa.int8(), **dict.fromkeys(DENSE, pa.int64()), **dict.fromkeys(SPARSE, pa.string())}
    return TextFile(path, kinds, names=list(kinds), empty={*DENSE, *SPARSE}, delimiter="\t").batches()


def _block(rows: Rows, split: np.ndarray) -> Block:
    columns = {"label": rows.binary("label"), **{name: rows.column(name) for name in DENSE}}
    return Block(split, columns | {name: rows.hexadecimal(name) for name in SPARSE})
