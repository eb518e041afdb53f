"""Reading for `profile`: what the footers of all files say about a column, and a sample of rows from all over."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from dist_rec.data.footers import DataError, FileFooter, is_list, open_file

Kind = Literal["integer", "float", "bool", "integers", "floats", "text", "time", "other"]
"""What one value per row is; "integers" and "floats" are lists."""

USABLE: tuple[Kind, ...] = ("integer", "float", "bool", "integers", "floats")
"""Kinds that a schema can declare, and that a sample is read of."""

_RUN_ROWS = 2048  # rows that lie together in a sample
_MAX_GROUPS = 64  # row groups that a sample touches: each is decoded up to its last run
_SAMPLE_BYTES = 512 * 2**20  # long lists make the sample smaller than was asked for
_FOOTER_THREADS = 16


def kind_of(kind: pa.DataType) -> Kind:
    """What a schema could make of a column of this Arrow type."""
    if is_list(kind):
        inner = kind_of(kind.value_type)
        return "integers" if inner == "integer" else "floats" if inner == "float" else "other"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "float"
    if pa.types.is_boolean(kind):
        return "bool"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return "text"
    return "time" if pa.types.is_temporal(kind) else "other"


def common_columns(footers: Sequence[FileFooter]) -> tuple[dict[str, Kind], dict[str, str]]:
    """Kind by column, and what is wrong with those that files do not agree on."""
    seen: dict[str, dict[Kind, str]] = {}
    counts: dict[str, int] = {}
    unusable = {}
    for footer in footers:
        for field in footer.arrow_schema:
            seen.setdefault(field.name, {}).setdefault(kind_of(field.type), footer.path)
            counts[field.name] = counts.get(field.name, 0) + 1
        for name in {n for n in footer.arrow_schema.names if footer.arrow_schema.names.count(n) > 1}:
            unusable[name] = f"is there several times in {footer.path}; give each column its own name"
    for name, kinds in seen.items():
        if len(kinds) > 1:
            where = " and ".join(f"{kind} in {path}" for kind, path in kinds.items())
            unusable.setdefault(name, f"is {where}; write one type")
        elif counts[name] < len(footers):
            lacking = next(f.path for f in footers if name not in f.arrow_schema.names)
            number = f"{len(footers) - counts[name]} of {len(footers)} files"
            unusable.setdefault(name, f"is missing in {number}, e.g. {lacking}")
    return {name: next(iter(kinds)) for name, kinds in seen.items()}, unusable


@dataclass
class Extent:
    """What the footers say about one column: bounds and nulls, if all row groups have them, and values."""

    values: int = 0
    nulls: int | None = 0
    low: Any = None
    high: Any = None
    is_exact: bool = True

    def add(self, values: int, nulls: int | None, bounds: tuple[Any, Any] | None) -> None:
        """One row group more; values: with nulls. None: not recorded."""
        self.values += values
        self.nulls = None if self.nulls is None or nulls is None else self.nulls + nulls
        if bounds is not None:
            self.low = bounds[0] if self.low is None else min(self.low, bounds[0])
            self.high = bounds[1] if self.high is None else max(self.high, bounds[1])
        elif values and nulls != values:
            self.is_exact = False


def read_extents(footers: Sequence[FileFooter]) -> dict[str, Extent]:
    """The extent of every usable column over all files, from their footers alone."""
    extents: dict[str, Extent] = {}
    with ThreadPoolExecutor(min(_FOOTER_THREADS, len(footers))) as pool:
        for facts in pool.map(_file_extents, footers):
            for name, values, nulls, bounds in facts:
                extents.setdefault(name, Extent()).add(values, nulls, bounds)
    return extents


def _file_extents(footer: FileFooter) -> list[tuple[str, int, int | None, tuple[Any, Any] | None]]:
    """For every row group and usable column: (name, values, nulls, bounds)."""
    kinds = {field.name: kind_of(field.type) for field in footer.arrow_schema}
    with open_file(footer.path) as file:
        leaves = [(i, name) for i, name in _leaves(file.schema, kinds) if kinds[name] in USABLE]
        facts = []
        for group in range(file.metadata.num_row_groups):
            metadata = file.metadata.row_group(group)
            for i, name in leaves:
                chunk = metadata.column(i)
                statistics = chunk.statistics
                bounds = None
                if statistics is not None and statistics.has_min_max:
                    bounds = (statistics.min, statistics.max)
                nulls = statistics.null_count if statistics is not None and statistics.has_null_count else None
                facts.append((name, chunk.num_values, nulls, bounds))
    return facts


def _leaves(schema: Any, kinds: dict[str, Kind]) -> Iterator[tuple[int, str]]:
    """Index of each Parquet leaf column that belongs to a flat column or a list, with the column's name."""
    for i in range(len(schema)):
        path = schema.column(i).path
        name = path if path in kinds else next((n for n in kinds if path.startswith(f"{n}.")), None)
        if name is not None:
            yield i, name


def affordable_rows(wanted: int, rows: int, extents: Sequence[Extent | None]) -> int:
    """`wanted` rows, or fewer if they would not fit in memory."""
    bytes_per_row = 8 * sum(e.values for e in extents if e is not None) / max(rows, 1)
    return max(1, min(wanted, int(_SAMPLE_BYTES / max(bytes_per_row, 1))))


def read_sample(footers: Sequence[FileFooter], names: list[str], wanted: int) -> pa.Table:
    """About `wanted` rows of these columns; all rows if there are no more.

    Each chunk is a run of rows that lie together; row groups and runs are spread evenly, so memory and time hardly grow
    with the data set. Raises DataError for a row group that cannot be decoded.
    """
    groups = [(footer, i, n) for footer in footers for i, n in enumerate(footer.row_group_rows) if n]
    ends = np.cumsum([n for _, _, n in groups])
    if wanted >= ends[-1]:
        quota = {i: n for i, (_, _, n) in enumerate(groups)}
    else:
        # evenly spread over the rows, so that a large row group is met more often
        marks = min(_MAX_GROUPS, wanted)
        places = np.searchsorted(ends, (np.arange(marks) + 0.5) * ends[-1] / marks, side="right")
        quota = {int(i): math.ceil((places == i).sum() * wanted / marks) for i in np.unique(places)}
    parts: list[pa.Table] = []
    for i, rows in quota.items():
        footer, group, size = groups[i]
        parts += _read_runs(footer.path, group, names, min(rows, size), size)
    return pa.concat_tables(parts, promote_options="permissive")


def _read_runs(path: str, group: int, names: list[str], wanted: int, size: int) -> Iterator[pa.Table]:
    """About `wanted` rows of a row group of `size`, in runs spread over it; all of it is decoded, a run at a time."""
    run = min(_RUN_ROWS, max(1, wanted // 8)) if wanted < size else _RUN_ROWS
    runs, keep = math.ceil(size / run), math.ceil(wanted / run)
    try:
        with open_file(path) as file:
            for i, batch in enumerate(file.iter_batches(run, row_groups=[group], columns=names)):
                if (i + 1) * keep // runs > i * keep // runs:
                    yield pa.Table.from_batches([batch])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: row group {group} cannot be read ({error}); write the file again") from error
