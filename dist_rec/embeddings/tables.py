"""From table sets and a schema to the list of tables: names, sizes, options. Arithmetic only, no tensors."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from dist_rec.contract import TableSet
from dist_rec.data.schema import Schema
from dist_rec.data.views import Views, feature_of, view_key
from dist_rec.settings import Complaint

ShardingName = Literal[
    "auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "data_parallel"
]
KernelName = Literal["auto", "fused", "fused_uvm", "fused_uvm_caching"]
SPLITS_COLUMNS = ("column_wise", "table_column_wise")
BYTES_PER_VALUE = 4


@dataclass
class TableOptions:
    """How one table is pooled, placed and initialised; what is left out comes from the `embeddings` section."""

    pooling: Literal["sum", "mean"] | None = None
    sharding: ShardingName | None = None
    kernel: KernelName | None = None
    init_bound: float | None = None
    inner_dim: int | None = None  # 0: a single layer, whatever the section says


@dataclass
class EmbeddingsConfig:
    """The `embeddings` section: defaults for every table, and exceptions by table name."""

    pooling: Literal["sum", "mean"] = "sum"  # how the ids of one row become one vector; mean of no ids is 0
    sharding: ShardingName = "auto"  # auto: TorchRec's planner chooses
    # GPU only: fused keeps a table in device memory, fused_uvm in host memory, fused_uvm_caching in host memory
    # with a device cache; auto: the planner chooses. CPU has fused only.
    kernel: KernelName = "auto"
    init_bound: float | None = None  # initial values are uniform in (-b, b); default b = 1 / sqrt(rows of the table)
    # MLET (arXiv 2309.15881): train tables of served width d as two layers, n x inner_dim times inner_dim x d
    inner_dim: int | None = None
    # a table with at most factor_above * d rows stays single-layer: it has hardly more rows than it can have
    # directions, so there is nothing to share; its own inner_dim under `tables` overrules this
    factor_above: float = 4.0
    # before: a shard projects its partial sums, and d columns are exchanged. after: inner_dim columns are exchanged
    project: Literal["before", "after"] = "before"
    # scaled: W2 ~ N(0, 1 / inner_dim), so that the product has a plain table's scale for every inner_dim.
    # prototype: W2 ~ N(0, 0.25^2), as in the authors' code
    projection_init: Literal["scaled", "prototype"] = "scaled"
    # exceptions by table: a table is named after its feature (or the schema's `table`) in every table set, or
    # "<set>_<table>" for one table set only
    tables: dict[str, TableOptions] = field(default_factory=dict)

    def check(self, table_sets: list[TableSet], schema: Schema) -> Iterator[Complaint]:
        """Complaints about exceptions that match no table and about pooling that the features cannot have."""
        known = {name for s in table_sets for f in s.features for name in _names_of(s, f, schema)}
        for name in self.tables:
            if name not in known:
                close = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"tables: {', '.join(sorted(known))}"
                yield Complaint(f"tables.{name}", f"matches no table; {hint}")
        for table in make_tables(table_sets, schema, self):
            weighted = [f for f in table.features if schema.sparse[f].weights is not None]
            if table.pooling == "mean" and weighted:
                text = f"is mean for table '{table.name}', but feature '{weighted[0]}' has a weight per id"
                yield Complaint("pooling", f"{text}; a weighted feature is summed: set pooling: sum for this table")
            if not table.init_bound > 0:
                yield Complaint("init_bound", f"is {table.init_bound} for table '{table.name}'; use a number > 0")
            if table.inner_dim is not None and table.inner_dim < table.dim:
                text = f"is {table.inner_dim} for table '{table.name}', which is served with {table.dim} columns"
                yield Complaint("inner_dim", f"{text}; two layers need at least as many inside")
            if table.inner_dim is not None and self.project == "before" and table.sharding in SPLITS_COLUMNS:
                text = f"is {table.sharding} for table '{table.name}', which splits the inner columns that its second"
                text += " layer sums over, so no shard can project alone; use row_wise, or project: after"
                yield Complaint("sharding", text)


@dataclass(frozen=True)
class Table:
    """One embedding table.

    Attributes:
        name: "<set>_<table>", unique over all sets; part of the parameter's name in checkpoints.
        num_rows: n. dim: d, the width that is served.
        inner_dim: k, the width that is stored and trained, if the table has two layers; None if it has one.
        features: the keys it serves: features, and their views.
        mean_lengths: per feature, mean number of ids per row of a batch.
    """

    name: str
    num_rows: int
    dim: int
    features: tuple[str, ...]
    mean_lengths: tuple[float, ...]
    pooling: str
    sharding: str
    kernel: str
    init_bound: float
    inner_dim: int | None = None

    @property
    def width(self) -> int:
        """Columns that are stored, trained and sharded."""
        return self.dim if self.inner_dim is None else self.inner_dim

    @property
    def num_bytes(self) -> int:
        """Bytes of the sharded weights, without optimiser state."""
        return self.num_rows * self.width * BYTES_PER_VALUE


def view_sets(table_sets: list[TableSet], views: Views) -> list[TableSet]:
    """What the views look up: per set and view with features of it, the set "<set>#<view>" of the views' keys."""
    found = []
    for view, shown in views.items():
        for table_set in table_sets:
            keys = tuple(view_key(f, view) for f in table_set.features if f in shown)
            found += [TableSet(view_key(table_set.name, view), keys, table_set.dim)] if keys else []
    return found


def make_tables(
    table_sets: list[TableSet], schema: Schema, config: EmbeddingsConfig, views: Views | None = None
) -> list[Table]:
    """The tables of all sets, set by set, in the order in which their first feature appears in the set.

    views: extra keys of the features, served by the same tables.
    """
    tables = []
    for table_set in table_sets:
        members: dict[str, list[str]] = {}
        for key in (*table_set.features, *(k for s in view_sets([table_set], views or {}) for k in s.features)):
            feature = feature_of(key)
            members.setdefault(schema.sparse[feature].table or feature, []).append(key)
        tables += [_table(table_set, base, tuple(fs), schema, config) for base, fs in members.items()]
    return tables


def _table(
    table_set: TableSet, base: str, features: tuple[str, ...], schema: Schema, config: EmbeddingsConfig
) -> Table:
    columns = [schema.sparse[feature_of(f)] for f in features]
    name = f"{table_set.name}_{base}"
    options = config.tables.get(name) or config.tables.get(base) or TableOptions()
    bound = options.init_bound if options.init_bound is not None else config.init_bound
    return Table(
        name=name,
        num_rows=columns[0].num_rows,
        dim=table_set.dim,
        features=features,
        mean_lengths=tuple(c.mean_length for c in columns),
        pooling=options.pooling or config.pooling,
        sharding=options.sharding or config.sharding,
        kernel=options.kernel or config.kernel,
        init_bound=bound if bound is not None else columns[0].num_rows ** -0.5,
        inner_dim=_inner_dim(columns[0].num_rows, table_set.dim, options, config),
    )


def _inner_dim(num_rows: int, dim: int, options: TableOptions, config: EmbeddingsConfig) -> int | None:
    if options.inner_dim is not None:
        return options.inner_dim or None
    return config.inner_dim if num_rows > config.factor_above * dim else None


def _names_of(table_set: TableSet, feature: str, schema: Schema) -> tuple[str, str]:
    base = schema.sparse[feature].table or feature
    return base, f"{table_set.name}_{base}"


def output_names(tables: list[Table]) -> dict[tuple[str, str], str]:
    """(table name, feature) -> TorchRec's name of that output, which says "feature@table" where tables compete."""
    uses = Counter(feature for table in tables for feature in table.features)
    return {(t.name, f): f"{f}@{t.name}" if uses[f] > 1 else f for t in tables for f in t.features}
