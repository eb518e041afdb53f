"""From a `RawLog` to Parquet with a schema: one pass over the raw files collects ids and means, a second one writes."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from tqdm import tqdm

from dist_rec.data.footers import DataError
from dist_rec.data.ids import hash_ids
from dist_rec.data.raw_log import LEFT_OUT, Block, RawLog

_log = logging.getLogger(__name__)

MAX_IDS = 5_000_000
ROW_GROUP_ROWS = 65_536
ROWS_PER_FILE = 32 * ROW_GROUP_ROWS
BATCH_SIZE = 4096
_SETTLED = 1 << 16
_DOMAIN = "domain"
_TRAIN = 0


class Ids:
    """The ids of a column: 1, 2, ... for the values seen in training in their order, 0 for null and for all others.

    Holds at most some 2 * `limit` values, 8 bytes each. A column with more than `limit` is hashed instead, to 1 ..
    limit, so that values share ids, and one that training has not seen has an id too.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values = np.empty(0, np.int64)  # sorted
        self._fresh: list[NDArray[np.int64]] = []  # seen since; a sort for each block would cost more than reading it
        self._overflown = False

    @property
    def hashed(self) -> bool:
        """Whether there were more values than the limit."""
        self._settle()
        return self._overflown

    @property
    def num_ids(self) -> int:
        """Ids 0 .. num_ids - 1 can occur."""
        return 1 + (self._limit if self.hashed else len(self._values))

    def see(self, values: NDArray[np.int64]) -> None:
        """Takes note of values of training rows."""
        if self._overflown:
            return
        distinct = np.unique(values)
        self._fresh.append(distinct[~self._known(distinct)[1]])
        if sum(map(len, self._fresh)) > max(len(self._values), _SETTLED):
            self._settle()

    def encode(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """(n,) values -> (n,) ids."""
        if self.hashed:
            return 1 + hash_ids(values, self._limit)
        place, known = self._known(values)
        return np.where(known, place + 1, 0)

    def _settle(self) -> None:
        if self._fresh:
            self._values, self._fresh = np.unique(np.concatenate([self._values, *self._fresh])), []
        if len(self._values) > self._limit:
            self._values, self._overflown = np.empty(0, np.int64), True

    def _known(self, values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        if not len(self._values):
            return np.zeros(len(values), np.int64), np.zeros(len(values), np.bool_)
        place = np.searchsorted(self._values, values).clip(max=len(self._values) - 1)
        return place, self._values[place] == values


class _Scale:
    """Mean and standard deviation of sign(x) ln(1 + |x|) over training rows, nulls as 0; nulls of all rows."""

    def __init__(self) -> None:
        self.rows, self.nulls, self._sum, self._squares = 0, 0, 0.0, 0.0

    def see(self, column: pa.Array, train: pa.Array) -> None:
        self.nulls += column.null_count
        column = column.filter(train)
        x = pc.fill_null(column.cast(pa.float64(), safe=False), 0).to_numpy(zero_copy_only=False)
        t = np.sign(x) * np.log1p(np.abs(x))
        self.rows += len(x)
        self._sum, self._squares = self._sum + float(t.sum()), self._squares + float((t * t).sum())

    @property
    def mean(self) -> float:
        return self._sum / self.rows

    @property
    def std(self) -> float:
        """1 for a column that is constant."""
        variance = self._squares / self.rows - self.mean**2
        return math.sqrt(variance) if variance > 1e-12 else 1.0


class Measured:
    """What the first pass found in the training rows."""

    def __init__(self, log: RawLog, max_ids: int) -> None:
        self.ids = {name: Ids(max_ids) for name in log.sparse}
        self.scales = {name: _Scale() for name in log.dense}
        self._rows, self._values = 0, Counter[str]()
        for block in _shown(log, "reading"):
            self._see(block)
        if not self._rows:
            raise DataError("no row of the raw files is a training row; are the files whole?")
        self.lengths = {name: n / self._rows for name, n in self._values.items()}  # of list columns, on average

    def _see(self, block: Block) -> None:
        train = pa.array(block.split == _TRAIN)
        self._rows += int((block.split == _TRAIN).sum())
        for name, ids in self.ids.items():
            column = block.columns[name].filter(train)
            if pa.types.is_list(column.type):
                column = column.flatten()
                self._values[name] += len(column)
            ids.see(column.drop_null().to_numpy(zero_copy_only=False))
        for name, scale in self.scales.items():
            scale.see(block.columns[name], train)


def prepare(log: RawLog, out: Path, max_ids: int = MAX_IDS) -> dict[str, Any]:
    """Writes `out`/<split>/*.parquet, `out`/schema.yaml and `out`/counts.json, all or nothing; returns the counts.

    Memory: some 200 MB for blocks of text and row groups, at most 16 bytes for each of `max_ids` values of each column,
    and the tables that the data set joins (its module says which); it does not grow with the rows.

    Raises:
        DataError: the raw files are wrong, or `out` exists or cannot be written.
    """
    if out.exists():
        raise DataError(f"{out}: exists already; remove it, or choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        measured = Measured(log, max_ids)
        counts = _write(log, measured, temporary)
        (temporary / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
        (temporary / "schema.yaml").write_text(_schema(log, measured, out.absolute()))
        temporary.chmod(0o755)
        os.rename(temporary, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error}); choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _shown(log: RawLog, what: str) -> Iterator[Block]:
    with tqdm(desc=what, unit=" rows", unit_scale=True, disable=None) as bar:
        for block in log.blocks():
            yield block
            bar.update(len(block.split))


class _Writer:
    """One split: files of equal row groups; no folder for one without rows."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files, self._rows = folder, 0, 0
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, table: pa.Table) -> None:
        self._waiting.append(table)
        while sum(len(t) for t in self._waiting) >= ROW_GROUP_ROWS:
            whole = pa.concat_tables(self._waiting)
            self._waiting = [whole.slice(ROW_GROUP_ROWS)]
            self._write(whole.slice(0, ROW_GROUP_ROWS))

    def close(self) -> None:
        whole = pa.concat_tables(self._waiting) if self._waiting else None
        if whole is not None and len(whole):
            self._write(whole)
        if self._writer is not None:
            self._writer.close()

    def _write(self, table: pa.Table) -> None:
        if self._writer is not None and self._rows >= ROWS_PER_FILE:
            self._writer.close()
            self._writer, self._rows = None, 0
        if self._writer is None:
            self._folder.mkdir(exist_ok=True)
            self._writer = pq.ParquetWriter(
                self._folder / f"part-{self._files:05d}.parquet", table.schema, compression="zstd"
            )
            self._files += 1
        self._writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        self._rows += len(table)


def _write(log: RawLog, measured: Measured, folder: Path) -> dict[str, Any]:
    writers = {name: _Writer(folder / name) for name in log.splits}
    splits = {name: _Counts(log) for name in log.splits}
    read = left_out = 0
    for block in _shown(log, "writing"):
        table = _encoded(log, measured, block)
        read, left_out = read + len(block.split), left_out + int((block.split == LEFT_OUT).sum())
        for number, name in enumerate(log.splits):
            part = table.filter(pa.array(block.split == number))
            if len(part):
                splits[name].add(part)
                writers[name].add(part)
    for name, writer in writers.items():
        writer.close()
        if not splits[name].rows and name in ("train", "validation", "test"):
            raise DataError(f"the raw files have no row for {name}; are they whole? ({log.about})")
    if log.rows is not None and read != log.rows:
        _log.warning(
            "%s rows were read, but the published files have %s: are they whole?", f"{read:,}", f"{log.rows:,}"
        )
    return {
        "rows_read": read,
        "rows_left_out": left_out,
        "splits": {name: counts.summary() for name, counts in splits.items() if counts.rows},
        "num_ids": {name: ids.num_ids for name, ids in measured.ids.items()},
        "hashed": [name for name, ids in measured.ids.items() if ids.hashed],
    }


def _encoded(log: RawLog, measured: Measured, block: Block) -> pa.Table:
    numbers = (*log.labels, *log.others, *log.dense)
    columns = {name: block.columns[name].cast(pa.float32(), safe=False) for name in numbers}
    for name, ids in measured.ids.items():
        columns[name] = _ids_of(block.columns[name], ids)
    for name in (*log.numbered, *log.groups.values()):
        columns[name] = block.columns[name].cast(pa.int64())
    return pa.table(columns)


def _ids_of(column: pa.Array, ids: Ids) -> pa.Array:
    if pa.types.is_list(column.type):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return pa.ListArray.from_arrays(offsets, _ids_of(column.flatten(), ids))
    here = column.is_valid().to_numpy(zero_copy_only=False)
    values = pc.fill_null(column, 0).to_numpy(zero_copy_only=False)
    return pa.array(np.where(here, ids.encode(values), 0))


class _Counts:
    """Rows, positives, missing or unseen ids of a split, and its domains."""

    def __init__(self, log: RawLog) -> None:
        self._log, self.rows = log, 0
        self._positives: Counter[str] = Counter()
        self._zeros: Counter[str] = Counter()
        self._domains: Counter[int] = Counter()

    def add(self, table: pa.Table) -> None:
        self.rows += len(table)
        for name in self._log.labels:
            self._positives[name] += pc.sum(table[name]).as_py()
        for name in self._log.sparse:
            if not pa.types.is_list(table[name].type):
                self._zeros[name] += pc.sum(pc.equal(table[name], 0)).as_py()
        if _DOMAIN in self._log.groups:
            values, counts = np.unique(table[self._log.groups[_DOMAIN]].to_numpy(), return_counts=True)
            self._domains.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "positives": {name: n / self.rows for name, n in self._positives.items()},
            "missing_or_unseen": {name: n / self.rows for name, n in self._zeros.items() if n},
            **({"rows_by_domain": dict(sorted(self._domains.items()))} if self._domains else {}),
        }


def _schema(log: RawLog, measured: Measured, out: Path) -> str:
    sparse: dict[str, Mapping[str, Any]] = {}
    for name, ids in measured.ids.items():
        length = measured.lengths.get(name)
        several = {} if length is None else {"multi": True, "mean_length": max(round(length, 2), 0.01)}
        sparse[name] = {"num_ids": ids.num_ids, **several}
    sparse |= {name: {"num_ids": n} for name, n in log.numbered.items()}
    dense = {
        name: {
            **({"on_null": "fill"} if scale.nulls else {}),
            "transform": "log1p",
            "mean": round(scale.mean, 4),
            "std": round(scale.std, 4),
        }
        for name, scale in measured.scales.items()
    }
    groups = {
        name: {"column": column, **({"num_ids": log.numbered[column]} if column in log.numbered else {})}
        for name, column in log.groups.items()
    }
    config = {
        "data": {name: str(out / name) for name in ("train", "validation", "test")} | {"batch_size": BATCH_SIZE},
        "schema": {
            "labels": {name: {"kind": "binary"} for name in log.labels},
            **({"dense": dense} if dense else {}),
            "sparse": sparse,
            **({"groups": groups} if log.groups else {}),
        },
    }
    notes = [log.about, "Ids: 0 is missing or unseen in training; a config says `base: schema.yaml` and adds a model."]
    if log.others:
        added = f"a config adds one as `schema.labels.{log.others[0]}: {{kind: binary}}`"
        notes.append(f"The files have the labels {', '.join(log.others)} too, which are not declared; {added}.")
    hashed = [name for name, ids in measured.ids.items() if ids.hashed]
    notes += [f"Hashed, as they have more values than --max-ids: {', '.join(hashed)}."] if hashed else []
    text = "".join(f"# {line}\n" for note in notes for line in textwrap.wrap(note, 118))
    return text + yaml.safe_dump(config, sort_keys=False, default_flow_style=None, width=120)
