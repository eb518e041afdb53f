"""Along which axes rows are divided into cohorts: a group of the schema taken by value, or cut into intervals.

What a user writes::

    occupation       every value is a cohort
    age:10           ten cohorts of equal size, cut at the quantiles of all rows
    revenue:5%       the lowest 5 %, the highest 5 %, and what lies between
    age:18/25/35     cut at these values

Values that are equal are never divided: a row on an edge belongs to the cohort above it, so that cohorts cut at
quantiles are of equal size only where values differ. Letters: n rows, C cohorts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_rec.data.cohorts import Axis
from dist_rec.metrics.quantiles import OrderStatistics
from dist_rec.settings import Complaint

MAX_PARTS = 100
"""Cohorts that one axis may be cut into; more than that cannot each have 1 % of the rows."""

Values = NDArray[np.int64]


class AxisError(ValueError):
    """An axis that cannot divide these rows; the message names it and the fix."""


@dataclass(frozen=True)
class Cut:
    """How the values of a group become cohorts; at most one of the last three is set, and none means: by value.

    Attributes:
        name: of the group. parts: of equal size. tail: share of rows at either end. edges: given.
    """

    name: str
    parts: int | None = None
    tail: Fraction | None = None
    edges: tuple[int, ...] = ()

    @property
    def at_quantiles(self) -> bool:
        """Whether the edges depend on the rows."""
        return self.parts is not None or self.tail is not None

    def positions(self, rows: int) -> list[int]:
        """Where the edges would be if all `rows` values were sorted, from 0."""
        if self.parts is not None:
            return [rows * k // self.parts for k in range(1, self.parts)]
        assert self.tail is not None, "only cuts at quantiles have positions"
        end = int(rows * self.tail)
        return [end, max(rows - end, 0)] if 0 < end < rows - end else []


def parse_cut(text: str) -> Cut | str:
    """The cut that a user means (see the module), or what is wrong with it."""
    name, _, how = text.partition(":")
    if not name:
        return f"has '{text}', which names no group; write for example age, age:10, age:5% or age:18/25/35"
    if not how and ":" not in text:
        return Cut(name)
    if re.fullmatch(r"\d+", how):
        if 2 <= int(how) <= MAX_PARTS:
            return Cut(name, parts=int(how))
        return f"has '{text}'; an axis is cut into 2 to {MAX_PARTS} parts"
    if re.fullmatch(r"\d*\.?\d+%", how):
        tail = Fraction(how[:-1]) / 100
        return Cut(name, tail=tail) if 0 < tail < Fraction(1, 2) else f"has '{text}'; a tail has 0 to 50 % of the rows"
    if re.fullmatch(r"-?\d+(/-?\d+)+", how):
        edges = tuple(int(edge) for edge in how.split("/"))
        if all(low < high for low, high in pairwise(edges)) and all(-(2**63) <= e < 2**63 for e in edges):
            return Cut(name, edges=edges)
        return f"has '{text}', whose edges do not ascend or do not fit int64"
    return f"has '{text}'; after the colon write parts (10), tails (5%) or edges (18/25/35)"


def check_cuts(cuts: Iterable[Cut | str], groups: Iterable[str]) -> Iterator[Complaint]:
    """Complaints about what `parse_cut` gave, for a schema with these groups."""
    known, seen = list(groups), set()
    for cut in cuts:
        if isinstance(cut, str):
            yield Complaint("axes", cut)
        elif cut.name not in known:
            close = difflib.get_close_matches(cut.name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"
            text = f"names '{cut.name}', which is no group of the run's schema; {hint}"
            yield Complaint("axes", f"{text} (a group is declared in the config: schema.groups.NAME.column)")
        elif cut.name in seen:
            yield Complaint("axes", f"names '{cut.name}' twice; one cut for each group")
        else:
            seen.add(cut.name)


class CutAxis(NamedTuple):
    """An axis and its cohorts.

    Attributes:
        axis: how a value becomes a cell. cells: (C,) the cell of each cohort, ascending.
    """

    axis: Axis
    cells: tuple[int, ...]

    def numbers(self, values: Tensor) -> Tensor:
        """(n,) int64 values -> (n,) int64: the number of each row's cohort, from 0."""
        cells = torch.tensor(self.cells, dtype=torch.int64, device=values.device)
        # a value that no cohort has is only met in padding rows
        return torch.searchsorted(cells, self.axis.cells(values.contiguous())).clamp(max=len(self.cells) - 1)

    def describe(self, cell: int) -> str:
        """A cohort in words, in the units of the group."""
        name, edges = self.axis.name, self.axis.edges
        if edges is None:
            return f"{name} = {cell}"
        if cell == 0:
            return f"{name} < {edges[0]}"
        low = f"{edges[cell - 1]} <= {name}"
        return f"{low} < {edges[cell]}" if cell < len(edges) else f"{name} >= {edges[-1]}"


@dataclass
class _Seen:
    """What the first pass finds out about a group."""

    rows: int = 0
    low: int = 2**63 - 1
    high: int = -(2**63)
    values: set[int] = field(default_factory=set)  # for an axis that is taken by value; complete up to the limit

    def add(self, values: Values, limit: int) -> None:
        if not len(values):
            return
        self.rows += len(values)
        self.low, self.high = min(self.low, int(values.min())), max(self.high, int(values.max()))
        if len(self.values) <= limit:
            self.values.update(np.unique(values).tolist()[: limit + 1])

    def merge(self, others: Sequence[_Seen]) -> None:
        self.rows = sum(o.rows for o in others)
        self.low, self.high = min(o.low for o in others), max(o.high for o in others)
        self.values = set().union(*(o.values for o in others))


class Ranks(NamedTuple):
    """How the ranks of a job put together what each of them has read. Both are collective.

    every: an object -> those of all ranks, by rank. total: counts -> the sum of all ranks' counts.
    """

    every: Callable[[Any], list[Any]]
    total: Callable[[Values], Values]


Scan = Callable[[], Iterable[Mapping[str, Values]]]
"""One pass over this rank's rows: chunks of them, group -> (n,) int64. Every pass gives the same rows."""


def cut_axes(cuts: Sequence[Cut], scan: Scan, ranks: Ranks, max_values: int) -> list[CutAxis | AxisError]:
    """The cohorts of each cut, or why there are none; the same on every rank. Collective.

    max_values: how many different values an axis may have that is taken by value.
    Memory: `max_values` values, and `OrderStatistics` for each edge. Passes: one, and up to four more where something
    is cut at quantiles.
    """
    seen: dict[str, _Seen] = {cut.name: _Seen() for cut in cuts}
    limits = {cut.name: -1 if cut.at_quantiles or cut.edges else max_values for cut in cuts}
    for chunk in scan():
        for name, part in seen.items():
            part.add(chunk[name], limits[name])
    every = ranks.every(seen)
    for name, part in seen.items():
        part.merge([other[name] for other in every])
    edges = _edges([cut for cut in cuts if cut.at_quantiles and seen[cut.name].rows], seen, scan, ranks)
    return [_axis(cut, seen[cut.name], edges.get(cut.name, list(cut.edges)), max_values) for cut in cuts]


def _edges(cuts: Sequence[Cut], seen: Mapping[str, _Seen], scan: Scan, ranks: Ranks) -> dict[str, list[int]]:
    """group -> its values at the wanted quantiles."""
    open_: dict[str, OrderStatistics] = {}
    for cut in cuts:
        facts = seen[cut.name]
        open_[cut.name] = OrderStatistics(facts.low, facts.high, cut.positions(facts.rows))
    while any(not part.done for part in open_.values()):
        unfinished = {name: part for name, part in open_.items() if not part.done}
        for chunk in scan():
            for name, part in unfinished.items():
                part.add(chunk[name])
        for part in unfinished.values():
            part.narrow(ranks.total(part.counts))
    return {name: part.values for name, part in open_.items()}


def _axis(cut: Cut, seen: _Seen, edges: list[int], max_values: int) -> CutAxis | AxisError:
    if not seen.rows:
        return AxisError(f"'{cut.name}': there is no row with weight > 0")
    if not (cut.at_quantiles or cut.edges):
        if len(seen.values) > max_values:
            text = f"'{cut.name}' has more than {max_values} different values"
            return AxisError(f"{text}; cut it into parts with {cut.name}:10, or raise max_values")
        if len(seen.values) < 2:
            return AxisError(f"'{cut.name}' is {seen.low} in every row; take another axis")
        return CutAxis(Axis(cut.name), tuple(sorted(seen.values)))
    inside = sorted({edge for edge in edges if seen.low < edge <= seen.high})
    if not inside:
        text = f"'{cut.name}' has no edge with rows on both sides; its values lie in {seen.low}..{seen.high}"
        many = " and most are equal" if cut.at_quantiles else ""
        return AxisError(f"{text}{many}; give edges between them, e.g. {cut.name}:EDGE/EDGE, or take it by value")
    kept = tuple(inside) if cut.at_quantiles else cut.edges
    return CutAxis(Axis(cut.name, kept), tuple(range(len(kept) + 1)))
