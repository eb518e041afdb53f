"""What each Parquet column is, declared once, and what to do with values that break the declaration.

A `Schema` is plain data: the loader reads columns by it, the embedding stage derives tables from it, archs size
their inputs by it. Feature, dense and label names are Parquet column names.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from dist_rec.settings import Complaint, gather

_FLOAT32 = (2.0**-126, 3.4028234663852886e38)  # the smallest normal number above 0 and the largest


@dataclass
class DenseColumn:
    """One number per row (float or integer in the file), used as ``(t(x) - mean) / std``."""

    on_null: Literal["error", "fill"] = "error"  # what a null or NaN does; "fill" replaces it by `fill` and counts it
    fill: float = 0.0  # in the file's units, before the transform
    transform: Literal["none", "log1p"] = "none"  # log1p: sign(x) * ln(1 + |x|)
    mean: float = 0.0  # of t(x); `dist-rec init` measures it
    std: float = 1.0
    join: str | None = None  # not in the rows' files: read from the item table, for the item in this sparse feature
    column: str | None = None  # with `join`: its column of the item table; default: this column's own name

    def check(self) -> Iterator[Complaint]:
        """Complaints about this column's own settings."""
        if not _FLOAT32[0] <= self.std <= _FLOAT32[1]:
            text = "dense values are divided by it; give a number > 0 that float32 can hold"
            yield Complaint("std", f"is {self.std}; {text}")
        for key, used in (("mean", "is taken off dense values"), ("fill", "stands for nulls and for absent items")):
            value = getattr(self, key)
            if not abs(value) <= _FLOAT32[1]:  # nan too
                yield Complaint(key, f"is {value}; it {used}; give a finite number that float32 can hold")


@dataclass
class SparseColumn:
    """One id per row, or a list of ids per row (`multi`), looked up in a table of `rows` rows."""

    num_ids: int  # valid ids are 0 .. num_ids-1
    multi: bool = False  # the column is an Arrow list: any number of ids per row
    weights: str | None = None  # name of a list<float> column with one weight for each id of this column
    # an id < 0 or >= num_ids: "error" stops; "modulo" takes id mod num_ids; "hash" mixes the bits first;
    # "reserved" sends all of them to one extra row. All but "error" are counted and reported.
    out_of_range: Literal["error", "modulo", "hash", "reserved"] = "error"
    # a null (a null id inside a list too): "error" stops; "fill" reads id `fill`; "empty" looks nothing up;
    # "reserved" reads the extra row. All but "error" are counted and reported.
    on_null: Literal["error", "fill", "empty", "reserved"] = "error"
    fill: int = 0
    max_length: int | None = None  # keep the first max_length ids of a list; the dropped ids are counted
    mean_length: float = 1.0  # mean number of ids per row; the planner estimates cost by it
    table: str | None = None  # features that name the same table share it; default: a table of its own
    # not in the rows' files: read from the item table, for the item in this other feature; for a list of items, such as
    # a history, the bag has what all of them have
    join: str | None = None
    column: str | None = None  # with `join`: its column of the item table; default: this feature's own name

    @property
    def has_reserved_row(self) -> bool:
        """Whether the table has one row more than `num_ids`, for ids that are out of range or null."""
        return "reserved" in (self.out_of_range, self.on_null)

    @property
    def num_rows(self) -> int:
        """Rows of the table that serves this column: `num_ids`, and one more if a row is reserved."""
        return self.num_ids + int(self.has_reserved_row)

    def check(self) -> Iterator[Complaint]:
        """Complaints about this column's own settings."""
        if self.num_ids < 1:
            yield Complaint("num_ids", f"is {self.num_ids}; a table needs at least one id")
        if self.weights is not None and not self.multi:
            yield Complaint("weights", f"is '{self.weights}', but weights go with ids of a list; set multi: true")
        if self.max_length is not None and self.max_length < 1:
            yield Complaint("max_length", f"is {self.max_length}; use at least 1, or leave it out to keep all ids")
        if self.max_length is not None and not self.multi:
            yield Complaint("max_length", "is set on a column with one id per row; set multi: true or leave it out")
        if self.on_null == "fill" and not 0 <= self.fill < max(self.num_ids, 1):
            yield Complaint("fill", f"is {self.fill}; nulls would be read as an id outside 0..{self.num_ids - 1}")
        if not self.mean_length > 0:
            yield Complaint("mean_length", f"is {self.mean_length}; use the mean number of ids per row, > 0")


@dataclass
class LabelColumn:
    """One target per row."""

    kind: Literal["binary", "real"] = "binary"  # binary: any value but 0 and 1 stops the run
    on_null: Literal["error", "fill"] = "error"
    fill: float = 0.0

    def check(self) -> Iterator[Complaint]:
        """Complaints about this label's own settings."""
        if self.on_null == "fill" and self.kind == "binary" and self.fill not in (0, 1):
            yield Complaint("fill", f"is {self.fill}; a binary label is 0 or 1, so fill nulls with one of them")
        elif self.on_null == "fill" and not math.isfinite(self.fill):
            yield Complaint("fill", f"is {self.fill}; nulls would be read as no finite number")


@dataclass
class WeightColumn:
    """The sample weight: finite and >= 0."""

    column: str
    on_null: Literal["error", "fill"] = "error"
    fill: float = 1.0

    def check(self) -> Iterator[Complaint]:
        """Complaints about the weight's own settings."""
        if self.on_null == "fill" and not 0 <= self.fill < math.inf:
            yield Complaint("fill", f"is {self.fill}; a weight is a finite number >= 0")


@dataclass
class GroupColumn:
    """An integer per row by which metrics (or a method) group rows: a domain, a cohort axis, a user id.

    A model with parameters for each value (a tower per domain) needs `num_ids`; the policies for values that are null
    or out of range then say which of its parameters such a row uses.
    """

    column: str
    # a null (with `scale` a NaN too): "error" stops; "fill" reads `fill`; "reserved" reads the value num_ids. Counted.
    on_null: Literal["error", "fill", "reserved"] = "error"
    fill: int = -1  # the group's value where the column has none
    # for a column of numbers that are not integers: the group's value is floor(x * scale); 100 keeps two decimals
    scale: float | None = None
    num_ids: int | None = None  # valid values are 0 .. num_ids-1; without it any integer is valid
    # with num_ids, a value < 0 or >= num_ids: "error" stops; "fill" reads `fill`; "reserved" sends all of them to one
    # more value, num_ids, whose parameters learn from such rows alone. All but "error" are counted and reported.
    out_of_range: Literal["error", "fill", "reserved"] = "error"

    @property
    def origin(self) -> str:
        """What the group's values are made of: two groups with the same origin have the same values."""
        return self.column if self.scale is None else f"floor({self.column} * {self.scale:g})"

    @property
    def num_values(self) -> int | None:
        """`num_ids`, and one more if a value is reserved; None if any integer is valid."""
        reserved = "reserved" in (self.out_of_range, self.on_null)
        return None if self.num_ids is None else self.num_ids + int(reserved)

    def check(self) -> Iterator[Complaint]:
        """Complaints about this group's own settings."""
        if self.scale is not None and not 0 < self.scale < math.inf:
            yield Complaint("scale", f"is {self.scale}; the group's value is floor(x * scale), so use a number > 0")
        if self.num_ids is None:
            for key in ("out_of_range", "on_null"):
                if getattr(self, key) == "reserved" or (key == "out_of_range" and self.out_of_range != "error"):
                    yield Complaint(key, f"is {getattr(self, key)}, which needs to know the valid values; set num_ids")
            return
        if self.num_ids < 1:
            yield Complaint("num_ids", f"is {self.num_ids}; a group needs at least one value")
        if "fill" in (self.out_of_range, self.on_null) and not 0 <= self.fill < max(self.num_ids, 1):
            yield Complaint("fill", f"is {self.fill}; values would be read as one outside 0..{self.num_ids - 1}")


@dataclass
class ItemColumns:
    """The item table (`data.items`): a second Parquet source with one row per item of the catalogue.

    Columns with `join` are read from it. Its ids are those of `feature`, 0 .. num_ids-1 each at most once.
    """

    feature: str  # the sparse feature with the item of a row: in retrieval the positive
    id: str | None = None  # the item table's column of ids; default: called as `feature`
    # an item of a row that the item table does not have: "error" stops; "empty" leaves its joined columns empty (dense
    # ones take their `fill`) and counts it. Such an item is in no catalogue and can never be retrieved.
    on_missing: Literal["error", "empty"] = "error"

    @property
    def key(self) -> str:
        """The item table's column of ids."""
        return self.id or self.feature


@dataclass
class Schema:
    """All columns of a data set; the order here is the order of the tensors' columns.

    The same Parquet column may serve twice, for example as a sparse feature and as a group.
    """

    labels: dict[str, LabelColumn]
    sparse: dict[str, SparseColumn]
    dense: dict[str, DenseColumn] = field(default_factory=dict)
    weight: WeightColumn | None = None
    groups: dict[str, GroupColumn] = field(default_factory=dict)
    items: ItemColumns | None = None

    @property
    def is_weighted(self) -> bool:
        """Whether any feature carries a weight per id."""
        return any(c.weights is not None for c in self.sparse.values())

    def of_rows(self, wanted: Collection[str] | None = None) -> Schema:
        """The same without joined columns: what the rows' own files hold.

        wanted: only these features and dense columns, and those that they are joined by.
        """
        if wanted is None and self.items is None:
            return self
        columns: dict[str, SparseColumn | DenseColumn] = {**self.sparse, **self.dense}
        wanted = set(columns if wanted is None else wanted)
        wanted |= {join for n in wanted if (join := columns[n].join) is not None}
        return replace(
            self,
            sparse={name: column for name, column in self.sparse.items() if column.join is None and name in wanted},
            dense={name: column for name, column in self.dense.items() if column.join is None and name in wanted},
        )

    def of_items(self) -> Schema:
        """What the item table holds: its ids, then each joined column once, under its name there."""
        assert self.items is not None
        ids = SparseColumn(num_ids=self.sparse[self.items.feature].num_ids)
        sparse = {c.column or n: replace(c, join=None, column=None) for n, c in self.sparse.items() if c.join}
        dense = {c.column or n: replace(c, join=None, column=None) for n, c in self.dense.items() if c.join}
        return Schema(labels={}, sparse={self.items.key: ids, **sparse}, dense=dense)

    def item_features(self) -> list[str]:
        """The sparse features that an item alone decides: `items.feature` and what is joined by it."""
        assert self.items is not None
        feature = self.items.feature
        return [feature, *(name for name, column in self.sparse.items() if column.join == feature)]

    def num_values(self, group: str) -> int:
        """Values of a group that `group_problem` has no complaint about: all lie in 0 .. num_values-1."""
        values = self.groups[group].num_values
        assert values is not None
        return values

    def group_problem(self, group: str) -> str | None:
        """What keeps a model from having parameters for each value of a group, and the fix, or None."""
        if group not in self.groups:
            return f"names '{group}', which is no group of the schema; known: {', '.join(self.groups) or 'none'}"
        if self.groups[group].num_ids is None:
            return f"names group '{group}', of which it must know all values; set schema.groups.{group}.num_ids"
        return None

    def features_problem(self, names: list[str]) -> str | None:
        """Which of `names` is no sparse feature or stands there twice, and the fix, or None."""
        for name in names:
            if name not in self.sparse:
                return f"names '{name}', which is no sparse feature of the schema; known: {', '.join(self.sparse)}"
            if names.count(name) > 1:
                return f"names '{name}' twice; name each feature once"
        return None

    def columns(self) -> list[str]:
        """The Parquet columns to read, each once, in a fixed order; of a schema without joined columns."""
        names = [*self.labels, *self.dense, *self.sparse]
        names += [c.weights for c in self.sparse.values() if c.weights is not None]
        names += [g.column for g in self.groups.values()]
        names += [self.weight.column] if self.weight is not None else []
        return list(dict.fromkeys(names))

    def check(self) -> Iterator[Complaint]:
        """Complaints about the declaration itself; files are checked against it by the loader."""
        if not self.sparse:
            yield Complaint("sparse", "is empty; a recommendation model needs at least one sparse feature")
        for kind in ("dense", "sparse"):
            for name in set(getattr(self, kind)) & set(self.labels):
                yield Complaint(f"{kind}.{name}", "is also a label: the model would see its own target; remove one")
        for name in set(self.dense) & set(self.sparse):
            yield Complaint(f"dense.{name}", "is declared both dense and sparse; choose one")
        for name in self.sparse:
            if any(c in name for c in "@#."):
                yield Complaint(f"sparse.{name}", "has one of @ # . in its name, which name views and parameters")
        yield from self._check_shared_tables()
        yield from check_items(self)
        for kind in ("labels", "dense", "sparse", "groups"):
            for name, column in getattr(self, kind).items():
                yield from gather(f"{kind}.{name}", column.check())
        if self.weight is not None:
            yield from gather("weight", self.weight.check())

    def _check_shared_tables(self) -> Iterator[Complaint]:
        first: dict[str, str] = {}
        for name, column in self.sparse.items():
            other = first.setdefault(column.table or name, name)
            shares = f"but '{other}' shares table '{column.table or name}'"
            if self.sparse[other].num_ids != column.num_ids:
                had = self.sparse[other].num_ids
                yield Complaint(
                    f"sparse.{name}.num_ids", f"is {column.num_ids}, {shares} and has {had}; make them equal"
                )
            elif self.sparse[other].has_reserved_row != column.has_reserved_row:
                # not one more id instead: an id that is out of range here would then train the row reserved there
                has, lacks = ("has a", "has none") if column.has_reserved_row else ("has no", "has one")
                yield Complaint(
                    f"sparse.{name}",
                    f"{has} reserved row, {shares} and {lacks}; declare `reserved` on both or on neither",
                )


def check_items(schema: Schema) -> Iterator[Complaint]:
    """Complaints about the item table's declaration and about the columns joined from it."""
    joined = {f"{kind}.{n}": c for kind in ("sparse", "dense") for n, c in getattr(schema, kind).items()}
    for key, column in joined.items():
        if column.column is not None and column.join is None:
            yield Complaint(f"{key}.column", "is a name in the item table, so it goes with join; leave it out")
    joined = {key: column for key, column in joined.items() if column.join is not None}
    items = schema.items
    if items is None:
        for key in joined:
            yield Complaint(f"{key}.join", "needs an item table; declare schema.items and set data.items")
        return
    if items.feature not in schema.sparse:
        yield Complaint("items.feature", f"is '{items.feature}', which is no sparse feature; name that of the item ids")
        return
    id_space = schema.sparse[items.feature].num_ids
    by_feature = {column.join: f"{key}.join" for key, column in joined.items()} | {items.feature: "items.feature"}
    for name, key in by_feature.items():
        yield from (Complaint(key, text) for text in _id_problems(schema, name, id_space))
    if schema.sparse[items.feature].multi:
        yield Complaint("items.feature", f"is '{items.feature}', a list; the item of a row is one id")
    elif schema.sparse[items.feature].on_null == "empty":
        yield Complaint(
            "items.feature", f"is '{items.feature}' with on_null: empty; every row has an item, choose another"
        )
    for name, dense in schema.dense.items():
        if dense.join in schema.sparse and schema.sparse[dense.join].multi:
            yield Complaint(f"dense.{name}.join", f"is '{dense.join}', a list; a number can be joined by one id only")
    yield from _check_sources(schema, joined)


def _id_problems(schema: Schema, name: str, id_space: int) -> Iterator[str]:
    """What keeps feature `name` from naming rows of the item table."""
    column = schema.sparse.get(name)
    if column is None:
        yield f"is '{name}', which is no sparse feature; name the one with the item ids"
    elif column.join is not None:
        yield f"is '{name}', which is joined itself; name a feature of the rows' own files"
    elif column.num_ids != id_space:
        yield f"is '{name}' with num_ids {column.num_ids}, but the items have {id_space}; both need the same ids"
    elif column.out_of_range in ("modulo", "hash"):
        yield f"is '{name}' with out_of_range: {column.out_of_range}, which mixes items; use error or reserved"


def _check_sources(schema: Schema, joined: dict[str, SparseColumn | DenseColumn]) -> Iterator[Complaint]:
    """A column of the item table that serves several features is read in one way."""
    assert schema.items is not None
    first: dict[str, tuple[str, SparseColumn | DenseColumn]] = {}
    for key, column in joined.items():
        source = column.column or key.partition(".")[2]
        if source == schema.items.key:
            yield Complaint(f"{key}.column", f"is '{source}', the item table's ids; use the feature they come from")
        other, known = first.setdefault(source, (key, column))
        if _reading(column) != _reading(known):
            yield Complaint(
                key, f"and {other} read column '{source}' of the item table differently; declare them alike"
            )
    weights = [c.weights for c in joined.values() if isinstance(c, SparseColumn) and c.weights is not None]
    for name in set(weights) & set(first):
        yield Complaint(first[name][0], f"reads '{name}', which holds the weights of another column; choose one use")


def _reading(column: SparseColumn | DenseColumn) -> object:
    """What decides how a column's values are read."""
    if isinstance(column, DenseColumn):
        return replace(column, join=None, column=None)
    return replace(column, join=None, column=None, table=None, mean_length=1.0)
