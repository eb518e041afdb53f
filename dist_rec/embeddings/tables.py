"""From table sets and a schema to the list of tables: names, sizes, options. Arithmetic only, no tensors."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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
_WIDE = "wide_"


@dataclass
class TableOptions:
    """How one table is pooled, placed and initialised.

    What "<set>_<table>" leaves out comes from "<table>", and what that leaves out from the `embeddings` section.
    """

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
    # MLET (arXiv 2309.15881): train tables of served width d as two layers, n x inner_dim times inner_dim x d; 0 as
    # null: single layers. The first layer is a table to `optim.tables`; the second is a dense parameter: optim.dense
    # trains it with its weight decay, and optim.clip_norm covers it, although it scales the whole table
    inner_dim: int | None = None
    # a table with at most factor_above * d rows stays single-layer: it has hardly more rows than it can have
    # directions, so there is nothing to share; its own inner_dim under `tables` overrules this
    factor_above: float = 4.0
    # before: a shard projects its partial sums, and d columns are exchanged. after: inner_dim columns are exchanged
    project: Literal["before", "after"] = "before"
    # scaled: W2 ~ N(0, 1 / inner_dim), so that the product has a plain table's scale for every inner_dim.
    # prototype: W2 ~ N(0, 0.25^2), as in the authors' code
    projection_init: Literal["scaled", "prototype"] = "scaled"
    # false: W2 stays as it was drawn, the authors' control of a random projection; rows then learn from their own
    # batches alone, as those of a single layer do
    train_projection: bool = True
    # exceptions by table: a table is named after its feature (or the schema's `table`) in every table set, or
    # "<set>_<table>" for one table set only, which goes before
    tables: dict[str, TableOptions] = field(default_factory=dict)
    # where several table sets ask for the same feature (the experts of a multi-domain model). separate: a table for
    # each set, every one of which the feature's ids are sent to. wide: one table with a block of columns for each set:
    # the ids are sent once and one long row is read. Wide is exact under SGD, element-wise Adagrad and Adam but not
    # under row-wise Adagrad, which keeps one state per row: there it is another optimiser, that scales all sets of a
    # row alike. It starts from the same values, and has no two-layer tables.
    layout: Literal["separate", "wide"] = "separate"

    def check(self, table_sets: list[TableSet], schema: Schema) -> Iterator[Complaint]:
        """Complaints about exceptions that match no table and about pooling that the features cannot have."""
        known = {name for s in table_sets for f in s.features for name in _names_of(s, f, schema)}
        for name in self.tables:
            if name not in known:
                close = difflib.get_close_matches(name, sorted(known), n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"tables: {', '.join(sorted(known))}"
                yield Complaint(f"tables.{name}", f"matches no table; {hint}")
        if not self.factor_above >= 0:
            yield Complaint("factor_above", f"is {self.factor_above}; use a number >= 0; 0 factors every table")
        tables = make_tables(table_sets, schema, self)
        if self.inner_dim and all(t.inner_dim is None for t in tables):
            text = f"is {self.inner_dim}, but no table gets two layers: each has at most factor_above = "
            text += f"{self.factor_above:g} times as many rows as columns, or an inner_dim of 0 of its own"
            yield Complaint("inner_dim", f"{text}; lower factor_above, or leave inner_dim out")
        for table in tables:
            yield from self._check_wide(table)
            yield from self._check_layers(table)
            weighted = [f for f in table.features if schema.sparse[f].weights is not None]
            if table.pooling == "mean" and weighted:
                text = f"is mean for table '{table.name}', but feature '{weighted[0]}' has a weight per id"
                text += "; a weighted feature is summed: set pooling: sum for this table"
                yield Complaint(self._key(table, "pooling"), text)
            if not table.init_bound > 0:
                text = f"is {table.init_bound} for table '{table.name}'; use a number > 0"
                yield Complaint(self._key(table, "init_bound"), text)

    def _check_layers(self, table: Table) -> Iterator[Complaint]:
        if table.inner_dim is None:
            return
        if table.inner_dim < table.dim:
            text = f"is {table.inner_dim} for table '{table.name}', which is served with {table.dim} columns"
            yield Complaint(self._key(table, "inner_dim"), f"{text}; two layers need at least as many inside")
        if self.project == "before" and table.sharding in SPLITS_COLUMNS:
            text = f"is {table.sharding} for table '{table.name}', which splits the inner columns that its second"
            text += " layer sums over, so no shard can project alone; use row_wise, or project: after"
            yield Complaint(self._key(table, "sharding"), text)

    def _key(self, table: Table, option: str) -> str:
        """Where the section says what `option` is for a table."""
        block = table.blocks[0]
        for name in (block.name, block.name.removeprefix(f"{block.table_set}_")):
            if name in self.tables and getattr(self.tables[name], option) is not None:
                return f"tables.{name}.{option}"
        return option

    def options(self, *names: str) -> TableOptions:
        """What is said of one table, by the first of its names that says it, option by option."""
        given = [self.tables[name] for name in names if name in self.tables]
        found: dict[str, Any] = {}
        for options in reversed(given):
            found |= {name: value for name, value in vars(options).items() if value is not None}
        return TableOptions(**found)

    def _check_wide(self, table: Table) -> Iterator[Complaint]:
        if len(table.blocks) == 1:
            return
        for block in table.blocks:
            if block.name in self.tables:
                text = f"is for one table set, but layout: wide keeps the sets of '{table.key}' in one table"
                yield Complaint(f"tables.{block.name}", f"{text}; name it '{table.key}', or use layout: separate")
        if table.inner_dim is not None:
            text = f"is wide, but the tables of '{table.key}' have two layers (inner_dim), one pair for each set"
            yield Complaint("layout", f"{text}; use layout: separate, or tables.{table.key}.inner_dim: 0")


class Block(NamedTuple):
    """The columns of a table that serve one table set.

    Attributes:
        table_set: the set's name. name: "<set>_<table>"; the first values depend on it, whatever table they lie in.
        width: number of columns that are stored.
    """

    table_set: str
    name: str
    width: int


@dataclass(frozen=True)
class Table:
    """One embedding table.

    Attributes:
        name: "<set>_<table>", or "wide_<table>" with a block for each of several sets; part of the parameter's name in
            checkpoints.
        blocks: the columns of each set that it serves, from the first column to the last.
        num_rows: n. dim: d, the width that is served, all blocks together.
        inner_dim: k, the width that is stored and trained, if the table has two layers; None if it has one.
        features: the keys it serves: features, and their views.
        mean_lengths: per feature, mean number of ids per row of a batch.
    """

    name: str
    blocks: tuple[Block, ...]
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
    def key(self) -> str:
        """What its settings are called in the `embeddings.tables` section."""
        return self.name if len(self.blocks) == 1 else self.name.removeprefix(_WIDE)

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
    """The tables of all sets, in the order in which sets and their features ask for them first.

    views: extra keys of the features, served by the same tables.
    """
    requests: dict[tuple[str, ...], list[tuple[TableSet, str]]] = {}
    for table_set in table_sets:
        for name in (*table_set.features, *(k for s in view_sets([table_set], views or {}) for k in s.features)):
            feature = feature_of(name)
            base = schema.sparse[feature].table or feature
            key = (base,) if config.layout == "wide" else (table_set.name, base)
            requests.setdefault(key, []).append((table_set, name))
    return [_table(key[-1], asked, schema, config) for key, asked in requests.items()]


def _table(base: str, asked: list[tuple[TableSet, str]], schema: Schema, config: EmbeddingsConfig) -> Table:
    """asked: every (set, feature or view of one) that reads this table."""
    table_sets = list(dict.fromkeys(s for s, _ in asked))
    features = tuple(dict.fromkeys(f for _, f in asked))
    columns = [schema.sparse[feature_of(f)] for f in features]
    own = f"{table_sets[0].name}_{base}"
    options = config.options(own, base)
    bound = options.init_bound if options.init_bound is not None else config.init_bound
    inner_dim = _inner_dim(columns[0].num_rows, table_sets[0].dim, options, config)
    return Table(
        name=own if len(table_sets) == 1 else f"{_WIDE}{base}",
        blocks=tuple(Block(s.name, f"{s.name}_{base}", inner_dim or s.dim) for s in table_sets),
        num_rows=columns[0].num_rows,
        dim=sum(s.dim for s in table_sets),
        features=features,
        mean_lengths=tuple(c.mean_length for c in columns),
        pooling=options.pooling or config.pooling,
        sharding=options.sharding or config.sharding,
        kernel=options.kernel or config.kernel,
        init_bound=bound if bound is not None else columns[0].num_rows ** -0.5,
        inner_dim=inner_dim,
    )


def _inner_dim(num_rows: int, dim: int, options: TableOptions, config: EmbeddingsConfig) -> int | None:
    if options.inner_dim is not None:
        return options.inner_dim or None
    return (config.inner_dim or None) if num_rows > config.factor_above * dim else None


def _names_of(table_set: TableSet, feature: str, schema: Schema) -> tuple[str, str]:
    base = schema.sparse[feature].table or feature
    return base, f"{table_set.name}_{base}"


def output_names(tables: list[Table]) -> dict[tuple[str, str], str]:
    """(table name, feature) -> TorchRec's name of that output, which says "feature@table" where tables compete."""
    uses = Counter(feature for table in tables for feature in table.features)
    return {(t.name, f): f"{f}@{t.name}" if uses[f] > 1 else f for t in tables for f in t.features}
