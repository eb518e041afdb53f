"""One row group -> numpy columns, as the schema says: filled, transformed, standardised, every id in range."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dist_rec.data.footers import DataError
from dist_rec.data.ids import Ids, Locate, PolicyCounts, Ragged, primitive
from dist_rec.data.schema import DenseColumn, GroupColumn, LabelColumn, Schema, SparseColumn

DECODED_VALUES = 2**20  # of flat columns, in one call
_TILE = 2**14  # numbers transformed in one call: torch divides more than 2**15 among threads, which training needs


@dataclass(frozen=True)
class Place:
    """Which rows of which row group a slice holds.

    Attributes:
        path: the file. row_group: its index in the file. first_row: row of the file that the row group begins with.
        rows: rows inside the row group, ascending, as a slice or an index array.
    """

    path: str
    row_group: int
    first_row: int
    rows: slice | np.ndarray

    def row(self, i: int) -> int:
        """Row of the file of the i-th row of the slice, from 0."""
        inside = self.rows.start + i if isinstance(self.rows, slice) else int(self.rows[i])
        return self.first_row + inside

    def locate(self, i: int) -> str:
        """Where the i-th row of the slice lies, in words."""
        return f"row {self.row(i)} of {self.path} (row group {self.row_group})"


def is_fixed(column: SparseColumn) -> bool:
    """Whether every row has exactly one id."""
    return not column.multi and column.on_null != "empty"


def id_dtype(schema: Schema) -> np.dtype:
    """int32 if it holds every id of every table, else int64: one type for all, as they share a KeyedJaggedTensor."""
    return np.dtype(np.int32 if all(c.num_rows < 2**31 for c in schema.sparse.values()) else np.int64)


@dataclass
class Columns:
    """Converted rows by column, filled slice by slice. Nd dense columns, F1 features with one id per row, T labels.

    Attributes:
        dense: (Nd, n) float32. fixed: (F1, n) ids. labels: (T, n) float32. weights: (n,) float32.
        groups: name -> (n,) int64. ragged: name -> one Ragged for each slice.
    """

    dense: np.ndarray
    fixed: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    groups: dict[str, np.ndarray]
    ragged: dict[str, list[Ragged]] = field(default_factory=dict)

    @classmethod
    def empty(cls, schema: Schema, rows: int) -> Columns:
        """Room for `rows` rows."""
        fixed = sum(is_fixed(column) for column in schema.sparse.values())
        return cls(
            dense=np.empty((len(schema.dense), rows), np.float32),
            fixed=np.empty((fixed, rows), id_dtype(schema)),
            labels=np.empty((len(schema.labels), rows), np.float32),
            weights=np.ones(rows, np.float32),
            groups={name: np.empty(rows, np.int64) for name in schema.groups},
            ragged={name: [] for name, column in schema.sparse.items() if not is_fixed(column)},
        )


def decode(
    file: pq.ParquetFile, path: str, row_group: int, rows: int, schema: Schema, at_once: bool = False
) -> pa.Table:
    """The schema's columns of one row group, on the calling thread.

    pyarrow keeps the pages of all columns of a call until its end, which takes twice the memory of the result. A large
    row group is therefore read by few columns at a time, unless `at_once`: on an object store each call has to wait.

    path: of the file. rows: of the row group, as the footers said.
    Raises DataError if it cannot be read or has another number of rows by now.
    """
    names = schema.columns()
    step = len(names) if at_once else max(DECODED_VALUES // max(rows, 1), 1)
    parts = [names[i : i + step] for i in range(0, len(names), step)]
    try:
        tables = [file.read_row_group(row_group, columns=part, use_threads=False) for part in parts]
    except (pa.ArrowException, OSError, IndexError) as error:
        raise DataError(
            f"{path}: row group {row_group} cannot be read ({' '.join(str(error).split())}); if the storage is well, "
            "the file is damaged: write it again or remove it"
        ) from error
    found = tables[0].num_rows
    if found != rows:
        raise DataError(
            f"{path}: row group {row_group} has {found} rows, had {rows} when the run began; do not change data files "
            "under a running job"
        )
    return pa.table({name: table.column(name) for table, part in zip(tables, parts, strict=True) for name in part})


def convert(table: pa.Table, schema: Schema, into: Columns, at: int, counts: PolicyCounts, place: Place) -> None:
    """Writes a table's rows to `into` from row `at` on.

    counts: gets what the policies other than "error" did. place: where the rows come from, for messages.
    Raises DataError for a value that its column's declaration forbids.
    """
    here = slice(at, at + table.num_rows)
    fixed, dtype = iter(into.fixed[:, here]), into.fixed.dtype
    for name, sparse in schema.sparse.items():
        ids = Ids(name, sparse, counts, place.locate)
        if is_fixed(sparse):
            next(fixed)[:] = ids.fixed(_array(table, name))
        elif sparse.multi:
            weights = _list_array(table, sparse.weights) if sparse.weights is not None else None
            into.ragged[name].append(_copied(ids.lists(_list_array(table, name), weights), dtype))
        else:
            into.ragged[name].append(_copied(ids.optional(_array(table, name)), dtype))
    for name, dense, out in zip(schema.dense, schema.dense.values(), into.dense[:, here], strict=True):
        Numbers(name, "dense", counts, place.locate).dense(_array(table, name), dense, out)
    for name, label, out in zip(schema.labels, schema.labels.values(), into.labels[:, here], strict=True):
        Numbers(name, "label", counts, place.locate).label(_array(table, name), label, out)
    for name, group in schema.groups.items():
        numbers = Numbers(group.column, f"group '{name}'", counts, place.locate)
        numbers.group(_array(table, group.column), group, into.groups[name][here])
    if schema.weight is not None:
        numbers = Numbers(schema.weight.column, "sample weight", counts, place.locate)
        array = _array(table, schema.weight.column)
        numbers.finite(array, schema.weight.on_null, schema.weight.fill, into.weights[here])
        numbers.require(into.weights[here] >= 0, array, "is negative", "a sample weight is finite and >= 0")


class Numbers(NamedTuple):
    """How the numbers of one column are judged, counted and located. n: rows of the slice."""

    name: str
    kind: str
    counts: PolicyCounts
    locate: Locate

    def dense(self, array: pa.Array, column: DenseColumn, out: np.ndarray) -> None:
        """out: (n,) float32, gets (t(x) - mean) / std."""
        # 64-bit columns are computed in double: a time stamp in seconds has no digits left in float32
        is_wide = array.type.bit_width == 64
        work = np.empty(len(out), np.float64) if is_wide else out
        self.finite(array, column.on_null, column.fill, work)
        if column.transform == "log1p":
            _signed_log1p(work)
        if column.mean != 0:
            work -= column.mean
        if column.std != 1:
            work /= column.std
        if is_wide:
            with np.errstate(over="ignore"):
                out[:] = work
            self.require(np.isfinite(out), array, "does not fit float32", "use transform: log1p, or mean and std")

    def label(self, array: pa.Array, column: LabelColumn, out: np.ndarray) -> None:
        """out: (n,) float32."""
        self.finite(array, column.on_null, column.fill, out)
        if column.kind == "binary":
            fix = "a binary label is 0 or 1; write it so, or set kind: real"
            self.require((out == 0) | (out == 1), array, "is neither 0 nor 1", fix)

    def group(self, array: pa.Array, column: GroupColumn, out: np.ndarray) -> None:
        """out: (n,) int64."""
        values, nulls = primitive(array)
        if column.scale is not None:
            values, nulls = self._floored(array, column.scale)
        elif values.dtype == np.uint64:
            good = values < 2**63 if nulls is None else nulls | (values < 2**63)
            self.require(good, array, "does not fit int64", "write it as int64")
        out[:] = values
        if column.num_ids is not None:
            self._in_range(out, nulls, column, column.num_ids)
        if nulls is not None:
            self._null(nulls, column.on_null)
            out[nulls] = column.num_ids if column.on_null == "reserved" else column.fill

    def _in_range(self, out: np.ndarray, nulls: np.ndarray | None, column: GroupColumn, num_ids: int) -> None:
        bad = (out < 0) | (out >= num_ids)
        if nulls is not None:
            bad &= ~nulls
        if not bad.any():
            return
        if column.out_of_range == "error":
            i = int(np.argmax(bad))
            raise DataError(
                f"{self._who()}: {out[i]} is outside 0..{num_ids - 1} at {self.locate(i)}; raise num_ids above it, or "
                "set out_of_range to fill or reserved"
            )
        self.counts[f"{self.kind}.out_of_range={column.out_of_range}"] += int(np.count_nonzero(bad))
        out[bad] = num_ids if column.out_of_range == "reserved" else column.fill

    def _floored(self, array: pa.Array, scale: float) -> tuple[np.ndarray, np.ndarray | None]:
        """(n,) int64 floor(x * scale), 0 where null or NaN; and which are."""
        values, nulls = primitive(array)
        with np.errstate(over="ignore", invalid="ignore"):
            work = np.floor(values.astype(np.float64) * scale)
        missing = np.isnan(work) if nulls is None else np.isnan(work) | nulls
        work[missing] = 0
        problem = f"times scale {scale} does not fit int64"
        self.require(np.abs(work) < 2**63, array, problem, "correct the value, or set a smaller scale")
        return work.astype(np.int64), missing if missing.any() else None

    def finite(self, array: pa.Array, null: Literal["error", "fill"], fill: float, out: np.ndarray) -> None:
        """out: (n,) gets the values, `fill` where they are null or NaN if `null` allows; an infinity raises."""
        values, nulls = primitive(array)
        with np.errstate(over="ignore"):
            out[:] = values
        if nulls is not None:
            out[nulls] = np.nan
        if np.isfinite(out).all():
            return
        missing = np.isnan(out)
        self.require(~np.isinf(out), array, "is not finite in float32", "correct the value; no policy replaces it")
        self._null(missing, null)
        out[missing] = fill

    def require(self, good: np.ndarray, array: pa.Array, problem: str, fix: str) -> None:
        """DataError that names the first row where `good` (n,) is false."""
        if not good.all():
            i = int(np.argmin(good))
            raise DataError(f"{self._who()}: {array[i].as_py()} {problem} at {self.locate(i)}; {fix}")

    def _null(self, missing: np.ndarray, policy: str) -> None:
        if policy == "error":
            row = self.locate(int(np.argmax(missing)))
            raise DataError(f"{self._who()}: null or NaN at {row}; set on_null: fill, or write the file without nulls")
        self.counts[f"{self.name}.null={policy}"] += int(np.count_nonzero(missing))

    def _who(self) -> str:
        return f"column '{self.name}' ({self.kind})"


def _signed_log1p(work: np.ndarray) -> None:
    """sign(x) * ln(1 + |x|), in place. Torch's: numpy's takes four times as long on a CPU without AVX-512."""
    for start in range(0, len(work), _TILE):
        tile = torch.from_numpy(work[start : start + _TILE])
        if tile.min() >= 0:  # counts mostly are, and need no temporary arrays
            torch.log1p(tile, out=tile)
        else:
            torch.copysign(tile.abs().log1p_(), tile, out=tile)


def _copied(bags: Ragged, dtype: np.dtype) -> Ragged:
    """Values of their own: a view would keep the whole row group in memory for as long as the block."""
    return bags._replace(values=bags.values.astype(dtype))


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def _list_array(table: pa.Table, name: str) -> pa.Array:
    array = _array(table, name)
    return array.cast(pa.list_(array.type.value_type)) if pa.types.is_fixed_size_list(array.type) else array
