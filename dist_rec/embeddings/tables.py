"""From table sets and a schema to the list of tables: names, sizes, options. Arithmetic only, no tensors."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from dist_rec.contract import TableSet
from dist_rec.data.schema import Schema
from dist_rec.settings import Complaint

ShardingName = Literal[
    "auto", "table_wise", "row_wise", "column_wise", "table_row_wise", "table_column_wise", "data_parallel"
]
KernelName = Literal["auto", "fused", "fused_uvm", "fused_uvm_caching"]
BYTES_PER_VALUE = 4


@dataclass
class TableOptions:
    """How one table is pooled, placed and initialised; what is left out comes from the `embeddings` section."""

    pooling: Literal["sum", "mean"] | None = None
    sharding: ShardingName | None = None
    kernel: KernelName | None = None
    init_bound: float | None = None


@dataclass
class EmbeddingsConfig:
    """The `embeddings` section: defaults for every table, and exceptions by table name."""

    pooling: Literal["sum", "mean"] = "sum"  # how the ids of one row become one vector; mean of no ids is 0
    sharding: ShardingName = "auto"  # auto: TorchRec's planner chooses
    # GPU only: fused keeps a table in device memory, fused_uvm in host memory, fused_uvm_caching in host memory
    # with a device cache; auto: the planner chooses. CPU has fused only.
    kernel: KernelName = "auto"
    init_bound: float | None = None  # initial values are uniform in (-b, b); default b = 1 / sqrt(rows of the table)
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


@dataclass(frozen=True)
class Table:
    """One embedding table.

    Attributes:
        name: "<set>_<table>", unique over all sets; part of the parameter's name in checkpoints.
        num_rows, dim: its size, float32.
        features: the features it serves.
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

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights, without optimiser state."""
        return self.num_rows * self.dim * BYTES_PER_VALUE


def make_tables(table_sets: list[TableSet], schema: Schema, config: EmbeddingsConfig) -> list[Table]:
    """The tables of all sets, set by set, in the order in which their first feature appears in the set."""
    tables = []
    for table_set in table_sets:
        members: dict[str, list[str]] = {}
        for feature in table_set.features:
            members.setdefault(schema.sparse[feature].table or feature, []).append(feature)
        tables += [_table(table_set, base, tuple(fs), schema, config) for base, fs in members.items()]
    return tables


def _table(
    table_set: TableSet, base: str, features: tuple[str, ...], schema: Schema, config: EmbeddingsConfig
) -> Table:
    columns = [schema.sparse[f] for f in features]
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
    )


def _names_of(table_set: TableSet, feature: str, schema: Schema) -> tuple[str, str]:
    base = schema.sparse[feature].table or feature
    return base, f"{table_set.name}_{base}"


def output_names(tables: list[Table]) -> dict[tuple[str, str], str]:
    """(table name, feature) -> TorchRec's name of that output, which says "feature@table" where tables compete."""
    uses = Counter(feature for table in tables for feature in table.features)
    return {(t.name, f): f"{f}@{t.name}" if uses[f] > 1 else f for t in tables for f in t.features}
