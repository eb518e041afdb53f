"""`Cohorts`: two groups of rows, the head and the tail, as a `cohorts.json` defines them by cells of named axes.

An axis is a group of the schema. Its values fall into cells: those between edges, or each value is a cell of its own.
A row is in a cohort if its cell is the cohort's on every axis. Letters: B rows.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dist_rec.data.schema import Schema
from dist_rec.settings import Complaint, ConfigError, gather, parse


@dataclass(frozen=True)
class Axis:
    """A group of the schema, cut into cells.

    name: of the group. edges: ascending, in the group's units; None for an axis on which every value is a cell.
    """

    name: str
    edges: Sequence[float] | None = None

    def cells(self, values: Tensor) -> Tensor:
        """(B,) int64 values -> (B,) int64 cells: the number of edges <= value, or the value itself.

        So cell 0 lies below the first edge, a value on an edge belongs to the cell above it, and the negative value
        that a schema may put in place of a null falls into cell 0.
        """
        if self.edges is None:
            return values
        # for integers, edge <= value if and only if ceil(edge) <= value: the comparison stays exact beyond 2**53
        edges = torch.tensor([math.ceil(e) for e in self.edges], dtype=torch.int64, device=values.device)
        # one group of several beside each other is not contiguous, and torch would warn the user of it
        return torch.bucketize(values.contiguous(), edges, right=True)


class Masks(NamedTuple):
    """head, tail: (B,) bool; no row is in both."""

    head: Tensor
    tail: Tensor


PARTS = ("head", "tail", "rest")
"""What the two cohorts divide all rows into."""


@dataclass
class Cohorts:
    """Head and tail, and their shares of the data they were found in; a `cohorts.json` holds these keys."""

    axes: list[str]  # names of groups of the schema
    edges: dict[str, list[int | float] | None]  # of every axis; null where each value is a cell
    head: dict[str, int]  # axis -> cell
    tail: dict[str, int]
    head_rate: float  # share of all rows that are positive and in the head
    tail_rate: float
    head_mass: float  # share of all rows that are in the head
    tail_mass: float
    label: str | None = None  # that `*_rate` count; may be left out
    columns: dict[str, str] | None = None  # axis -> `GroupColumn.origin` where the cohorts were found; may be left out
    path: str | None = None  # of the file this was read from, for the record

    def masks(self, groups: Mapping[str, Tensor]) -> Masks:
        """Which rows are in the head and which in the tail. groups: name -> (B,) int64, the axes among them."""
        cells = {name: Axis(name, self.edges[name]).cells(groups[name]) for name in self.axes}

        def inside(cohort: Mapping[str, int]) -> Tensor:
            return torch.stack([cells[name] == cohort[name] for name in self.axes]).all(dim=0)

        return Masks(inside(self.head), inside(self.tail))

    def parts(self, groups: Mapping[str, Tensor]) -> Tensor:
        """(3, B) bool: which rows are in the head, in the tail, in neither (`PARTS`). groups: as for `masks`."""
        head, tail = self.masks(groups)
        return torch.stack([head, tail, ~(head | tail)])

    def check(self) -> Iterator[Complaint]:
        """Everything that is wrong with the definition itself."""
        if not self.axes or len({*self.axes}) < len(self.axes):
            yield Complaint("axes", f"is {self.axes}; expected one or more different names of groups")
        for key in ("edges", "head", "tail"):
            if getattr(self, key).keys() != {*self.axes}:
                yield Complaint(key, f"is {getattr(self, key)}; expected a value for each of {', '.join(self.axes)}")
        for name, edges in self.edges.items():
            if edges is not None and not _ascending(edges):
                yield Complaint(f"edges.{name}", f"is {edges}; expected ascending numbers, at least one, or null")
        for key in ("head", "tail"):
            yield from self._check_cohort(key, getattr(self, key))
        if self.head == self.tail:
            yield Complaint("tail", f"is the same cell as head, {self.head}; two cohorts must differ")

    def _check_cohort(self, key: str, cohort: dict[str, int]) -> Iterator[Complaint]:
        for name, cell in cohort.items():
            edges = self.edges.get(name)
            if edges is not None and not 0 <= cell <= len(edges):
                yield Complaint(f"{key}.{name}", f"is {cell}; {len(edges)} edges make the cells 0 to {len(edges)}")
        rate, mass = (getattr(self, f"{key}_{kind}") for kind in ("rate", "mass"))
        for kind, share in (("rate", rate), ("mass", mass)):
            if not 0 <= share <= 1:
                yield Complaint(f"{key}_{kind}", f"is {share}; expected a share of all rows, 0 to 1")
        if 0 <= mass < rate <= 1:
            text = f"is {rate}, more than {key}_mass ({mass})"
            yield Complaint(f"{key}_rate", f"{text}; both are shares of all rows, and positive rows are some of them")

    def check_schema(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about axes and labels that the schema does not have."""
        known = ", ".join(schema.groups) or "none"
        for name in self.axes:
            then = (self.columns or {}).get(name)
            if name not in schema.groups:
                text = f"names '{name}', which is no group of the schema (known: {known}); declare it in schema.groups"
                yield Complaint("axes", text + (f" as {then}, as it was when the cohorts were found" if then else ""))
            elif then not in (None, schema.groups[name].origin):
                text = (
                    f"says that '{name}' was {then} when the cohorts were found, now it is {schema.groups[name].origin}"
                )
                yield Complaint("columns", f"{text}; put schema.groups.{name} back, or find the cohorts again")
        if self.label is not None and self.label not in schema.labels:
            yield Complaint("label", f"is '{self.label}', no label of the schema; known: {', '.join(schema.labels)}")


def read(path: str | Path) -> Cohorts:
    """The cohorts in a `cohorts.json`; keys that `Cohorts` does not have are passed over.

    ::

        {"axes": ["age"], "edges": {"age": [18, 25, 35]}, "head": {"age": 3}, "tail": {"age": 0},
         "head_rate": 0.021, "tail_rate": 0.004, "head_mass": 0.2, "tail_mass": 0.05, "label": "click"}

    Raises:
        ConfigError: the file cannot be read, or with everything that is wrong in it.
    """
    try:
        values = json.loads(Path(path).read_bytes())
    except OSError as error:
        text = f"cannot be read ({error.strerror or error}); `dist-rec cohorts` writes such a file"
        raise ConfigError([Complaint(str(path), text)]) from error
    except ValueError as error:
        raise ConfigError([Complaint(str(path), f"is not valid JSON ({error}); write it again")]) from error
    if not isinstance(values, dict):
        raise ConfigError([Complaint(str(path), "is not a JSON object; `dist-rec cohorts` writes such a file")])
    complaints: list[Complaint] = []
    known = {field.name for field in fields(Cohorts)} - {"path"}
    found = {key: value for key, value in values.items() if key in known}
    cohorts = parse(Cohorts, {**found, "path": str(path)}, complaints)
    complaints += [] if complaints else cohorts.check()
    if complaints:
        raise ConfigError(gather(str(path), complaints))
    return cohorts


@dataclass(kw_only=True)
class CohortsConfig:
    """The part of a component's settings that says which rows are in the head and which in the tail."""

    # path of a cohorts.json, or what is in one. The file is read once: the config that a run saves carries its content,
    # so that a run that is continued, repeated or evaluated by it has the cohorts that it began with
    cohorts: str | Cohorts

    def __post_init__(self) -> None:
        """Puts the content in the place of the path; a file that cannot be used is left to `check_cohorts`."""
        if isinstance(self.cohorts, str):
            with contextlib.suppress(ConfigError):
                self.cohorts = read(self.cohorts)

    @property
    def found(self) -> Cohorts:
        """The cohorts; ConfigError if the file cannot be used."""
        return read(self.cohorts) if isinstance(self.cohorts, str) else self.cohorts

    def check_cohorts(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the file, its content, and what of it the schema does not have."""
        try:
            complaints = [*self.found.check()] or [*self.found.check_schema(schema)]
        except ConfigError as error:
            complaints = error.complaints
        yield from gather("cohorts", complaints)

    def check_labels(self, schema: Schema) -> Iterator[Complaint]:
        """A complaint for each label that is not binary, for losses that take all labels."""
        for name, label in schema.labels.items():
            if label.kind != "binary":
                text = f"is a loss for labels 0 and 1, but label '{name}' has kind: {label.kind}"
                yield Complaint("name", f"{text}; declare it binary if it only holds 0 and 1, or choose another one")


def _ascending(edges: Sequence[float]) -> bool:
    finite = len(edges) > 0 and all(math.isfinite(e) for e in edges)
    return finite and all(low < high for low, high in itertools.pairwise(edges))
