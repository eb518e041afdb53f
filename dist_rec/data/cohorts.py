"""`Cohorts`: two groups of rows, the head and the tail, as a `cohorts.json` defines them by cells of named axes.

An axis is a group of the schema. Its values fall into cells: those between edges, or each value is a cell of its own.
A row is in a cohort if its cell is the cohort's on every axis. Letters: B rows, A axes.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from dist_rec.settings import Complaint, ConfigError, gather


@dataclass(frozen=True)
class Axis:
    """A group of the schema, cut into cells.

    name: of the group. edges: ascending, in the group's units; None for an axis on which every value is a cell.
    """

    name: str
    edges: tuple[float, ...] | None = None

    def cells(self, values: Tensor) -> Tensor:
        """(B,) int64 values -> (B,) int64 cells: the number of edges <= value, or the value itself.

        So cell 0 lies below the first edge, a value on an edge belongs to the cell above it, and the negative value
        that a schema may put in place of a null falls into cell 0.
        """
        if self.edges is None:
            return values
        # for integers, edge <= value if and only if ceil(edge) <= value: the comparison stays exact beyond 2**53
        edges = torch.tensor([math.ceil(e) for e in self.edges], dtype=torch.int64, device=values.device)
        return torch.bucketize(values, edges, right=True)


class Masks(NamedTuple):
    """head, tail: (B,) bool; no row is in both."""

    head: Tensor
    tail: Tensor


@dataclass(frozen=True)
class Cohorts:
    """Head and tail, and what the file says about them.

    Attributes:
        axes: A of them. head, tail: the cell on each axis.
        head_rate, tail_rate: share of all rows that are positive and in the cohort.
        head_mass, tail_mass: share of all rows that are in the cohort.
        label: the label that the rates count, or None if the file does not say.
        sha256: of the file's bytes, in hexadecimal; "" if there is no file.
    """

    axes: tuple[Axis, ...]
    head: tuple[int, ...]
    tail: tuple[int, ...]
    head_rate: float
    tail_rate: float
    head_mass: float
    tail_mass: float
    label: str | None = None
    sha256: str = ""

    def masks(self, groups: Mapping[str, Tensor]) -> Masks:
        """Which rows are in the head and which in the tail. groups: name -> (B,) int64, the axes among them."""
        cells = [axis.cells(groups[axis.name]) for axis in self.axes]

        def inside(cohort: tuple[int, ...]) -> Tensor:
            return torch.stack([c == cell for c, cell in zip(cells, cohort, strict=True)]).all(dim=0)

        return Masks(inside(self.head), inside(self.tail))

    def missing(self, groups: Iterable[str]) -> list[str]:
        """The axes that are not among `groups`, the names of a schema's groups."""
        return [axis.name for axis in self.axes if axis.name not in groups]


def read(path: str | Path) -> Cohorts:
    """The cohorts in a `cohorts.json`::

        {"axes": ["age"], "edges": {"age": [18, 25, 35]}, "head": {"age": 3}, "tail": {"age": 0},
         "head_rate": 0.021, "tail_rate": 0.004, "head_mass": 0.2, "tail_mass": 0.05, "label": "click"}

    `edges` is null for an axis on which every value is a cell; `label` may be left out; other keys are not read.

    Raises:
        ConfigError: the file cannot be read, or with everything that is wrong in it.
    """
    try:
        content = Path(path).read_bytes()
        values = json.loads(content)
    except OSError as error:
        reason = error.strerror or str(error)
        text = f"cannot be read ({reason}); `dist-rec cohorts` writes such a file"
        raise ConfigError([Complaint(str(path), text)]) from error
    except ValueError as error:
        raise ConfigError([Complaint(str(path), f"is not valid JSON ({error}); write it again")]) from error
    problems = list(_problems(values))
    if problems:
        raise ConfigError(gather(str(path), problems))
    axes = [Axis(name, _tuple(values["edges"][name])) for name in values["axes"]]
    return Cohorts(
        axes=tuple(axes),
        head=tuple(values["head"][axis.name] for axis in axes),
        tail=tuple(values["tail"][axis.name] for axis in axes),
        **{key: float(values[key]) for key in _SHARES},
        label=values.get("label"),
        sha256=hashlib.sha256(content).hexdigest(),
    )


_SHARES = ("head_rate", "tail_rate", "head_mass", "tail_mass")


def _tuple(edges: list[float] | None) -> tuple[float, ...] | None:
    return None if edges is None else tuple(edges)


def _problems(values: Any) -> Iterator[Complaint]:
    """Everything that is wrong in the content of a file."""
    if not isinstance(values, dict):
        yield Complaint("", "is not a JSON object; `dist-rec cohorts` writes such a file")
        return
    axes = values.get("axes")
    if not (
        isinstance(axes, list) and axes and _each(axes, lambda a: isinstance(a, str)) and len({*axes}) == len(axes)
    ):
        yield Complaint("axes", f"is {axes!r}; expected a list of different names of groups")
        return
    edges = values.get("edges")
    if not (isinstance(edges, dict) and edges.keys() >= {*axes}):
        yield Complaint("edges", f"is {edges!r}; expected the edges, or null, of each of {', '.join(axes)}")
        return
    bad = [name for name in axes if not _ascending(edges[name])]
    for name in bad:
        yield Complaint(f"edges.{name}", f"is {edges[name]!r}; expected ascending numbers, at least one, or null")
    for cohort in ("head", "tail"):
        yield from _problems_of_cells(cohort, values.get(cohort), {a: None if a in bad else edges[a] for a in axes})
        yield from _problems_of_shares(cohort, values)
    if values.get("head") == values.get("tail"):
        yield Complaint("tail", f"is the same cell as head, {values.get('head')!r}; two cohorts must differ")
    if not isinstance(values.get("label"), str | None):
        yield Complaint("label", f"is {values['label']!r}; expected the name of a label, or nothing")


def _problems_of_cells(cohort: str, cells: Any, edges: dict[str, list | None]) -> Iterator[Complaint]:
    if not (isinstance(cells, dict) and cells.keys() == edges.keys() and _each(cells.values(), _is_int)):
        yield Complaint(cohort, f"is {cells!r}; expected a whole number, the cell, for each of {', '.join(edges)}")
        return
    for name, cell in cells.items():
        last = len(edges[name] or ())
        if last and not 0 <= cell <= last:
            yield Complaint(f"{cohort}.{name}", f"is {cell}; {last} edges make the cells 0 to {last}")


def _problems_of_shares(cohort: str, values: dict[str, Any]) -> Iterator[Complaint]:
    shares: dict[str, Any] = {key: values.get(key) for key in (f"{cohort}_rate", f"{cohort}_mass")}
    bad = {key: share for key, share in shares.items() if not (_is_number(share) and 0 <= share <= 1)}
    for key, share in bad.items():
        yield Complaint(key, f"is {share!r}; expected a share of all rows, 0 to 1")
    if not bad and values[f"{cohort}_rate"] > values[f"{cohort}_mass"]:
        text = f"is {values[f'{cohort}_rate']}, more than {cohort}_mass ({values[f'{cohort}_mass']})"
        yield Complaint(f"{cohort}_rate", f"{text}; both are shares of all rows, and positive rows are some of them")


def _ascending(edges: Any) -> bool:
    if edges is None:
        return True
    if not (isinstance(edges, list) and edges and _each(edges, _is_number)):
        return False
    return all(low < high for low, high in itertools.pairwise(edges))


def _each(values: Iterable[Any], test: Callable[[Any], bool]) -> bool:
    return all(test(v) for v in values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
