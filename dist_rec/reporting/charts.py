"""Charts as SVG text: lines, histograms, rows of bars or dots with intervals, heat maps.

Every function returns one `<svg>` element for a page; `svg.document` makes a file of several.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from dist_rec.reporting.svg import (
    COLOURS,
    FAINT,
    FONT,
    GREY,
    INK,
    Frame,
    Key,
    Scale,
    dash,
    element,
    extent,
    heading,
    hint,
    legend,
    legend_width,
    line,
    number,
    path,
    picture,
    rectangle,
    shortened,
    text,
    width_of,
)

_WIDTH, _HEIGHT = 420, 260  # of the plotting area, unless it is asked to be small
_SMALL_WIDTH, _SMALL_HEIGHT = 195, 150
_ROWS_WIDTH = 340  # of row charts, so that two have room beside each other
_LEFT, _TOP, _BOTTOM = 76, 52, 48
_MOST_POINTS = 400  # of one line; more cannot be seen
_LABEL = 44  # characters of a row's label


@dataclass(frozen=True)
class Line:
    """One line of a chart: x and y, (n,) each; points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Histogram:
    """One histogram of a chart: (n,) heights over the chart's bins, and the colour and dashes of its outline."""

    name: str
    heights: ArrayLike
    colour: str
    dashes: str = ""


@dataclass(frozen=True)
class Row:
    """One row of a row chart: a value for each series, and the interval around it where there is one."""

    name: str
    values: Sequence[float]
    intervals: Sequence[tuple[float, float] | None] = field(default_factory=list)


def line_chart(
    title: str, lines: Sequence[Line], x_label: str, y_label: str, subtitle: str = "", *, small: bool = False
) -> str:
    """Lines over a shared x, each with a colour and a dash of its own. Long ones are thinned to what can be seen.

    small: of a row of charts with the same lines; the legend is left to another one.
    """
    points = [_finite(one) for one in lines]
    x, y = extent([x for ps in points for x, _ in ps], 0.02), extent([y for ps in points for _, y in ps])
    frame = _frame(x, y, small)
    parts = [*heading(title, subtitle), *frame.axes(x_label, y_label)]
    for i, (one, ps) in enumerate(zip(lines, points, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        drawn = [(frame.x(x), frame.y(y)) for x, y in ps]
        if len(drawn) > 1:
            parts.append(path(drawn, fill="none", stroke=colour, stroke_width=1.8, stroke_dasharray=dash(i)))
        if 0 < len(drawn) <= 30:
            parts += [_dot(x, y, colour, f"{one.name}: {number(v)}") for (x, y), (_, v) in zip(drawn, ps, strict=True)]
    keys = [Key(one.name, COLOURS[i % len(COLOURS)], dash(i)) for i, one in enumerate(lines) if points[i]]
    return _with_legend(parts, [] if small else keys, title, frame)


def histogram_chart(
    title: str,
    edges: ArrayLike,
    series: Sequence[Histogram],
    x_label: str,
    y_label: str,
    subtitle: str = "",
    *,
    small: bool = False,
) -> str:
    """Histograms over the same bins, as outlines over a faint fill.

    edges: (n + 1,) of the bins. small: as of `line_chart`, but with a legend.
    """
    bounds = np.asarray(edges, np.float64)
    heights = [np.asarray(one.heights, np.float64) for one in series]
    some = np.flatnonzero(np.sum(heights, axis=0) > 0)
    low, high = (some[0], some[-1] + 1) if len(some) else (0, len(bounds) - 1)
    top = max(float(values.max()) for values in heights) or 1.0
    frame = _frame((float(bounds[low]), float(bounds[high])), (0.0, 1.05 * top), small)
    parts = [*heading(title, subtitle), *frame.axes(x_label, y_label)]
    for one, values in zip(series, heights, strict=True):
        corners = [(frame.x(bounds[low]), frame.y(0))]
        for k in range(low, high):
            corners += [(frame.x(bounds[k]), frame.y(values[k])), (frame.x(bounds[k + 1]), frame.y(values[k]))]
        corners.append((frame.x(bounds[high]), frame.y(0)))
        style = {"fill": one.colour, "fill_opacity": 0.1, "stroke": one.colour, "stroke_dasharray": one.dashes}
        parts.append(path(corners, stroke_width=1.8, **style))
    return _with_legend(parts, [Key(one.name, one.colour, one.dashes) for one in series], title, frame)


def row_chart(
    title: str,
    rows: Sequence[Row],
    series: Sequence[str],
    x_label: str,
    *,
    kind: Literal["bars", "dots"],
    subtitle: str = "",
    first_colour: int = 0,
) -> str:
    """A row for each name, in it a bar (from 0) or a dot for each series, with its interval.

    first_colour: number of the first series' colour, where another chart has more series.
    """
    slot = 18 if kind == "bars" else 14
    step = slot * len(series) + 12
    left = 24 + max(width_of(shortened(row.name, _LABEL)) for row in rows)
    ends = [v for row in rows for v in row.values] + [v for row in rows for i in row.intervals if i for v in i]
    ends += [0.0] if kind == "bars" else []
    bottom = _TOP + step * len(rows)
    frame = Frame(Scale(*extent(ends), left, left + _ROWS_WIDTH), Scale(0, len(rows), bottom, _TOP))
    parts = [*heading(title, subtitle), *frame.axes(x_label, "", y_ticks=False)]
    for r, row in enumerate(rows):
        top = _TOP + r * step
        parts.append(line(left, top + step, left + _ROWS_WIDTH, top + step, stroke=FAINT))
        parts.append(text(left - 8, top + step / 2 + 4, shortened(row.name, _LABEL), anchor="end"))
        for i, value in enumerate(row.values):
            interval = row.intervals[i] if i < len(row.intervals) else None
            parts += _mark(frame, top + 6 + slot * i, slot, value, interval, first_colour + i, kind,
                           f"{row.name}, {series[i]}")  # fmt: skip
    if kind == "bars":
        parts.append(line(frame.x(0), _TOP, frame.x(0), bottom))
    keys = [Key(name, COLOURS[i % len(COLOURS)], None) for i, name in enumerate(series, first_colour)]
    return _with_legend(parts, keys, title, frame)


def heat_map(title: str, names: Sequence[str], matrix: ArrayLike, unit: str, subtitle: str = "") -> str:
    """A (C, C) matrix of values >= 0 as a square of cells, darker for more; columns bear the rows' numbers."""
    values, count = np.asarray(matrix, np.float64), len(names)
    size = max(10.0, min(46.0, 520 / max(count, 1)))
    left, top = 24 + max(width_of(shortened(f"{count} {name}", _LABEL)) for name in names), _TOP + 18
    highest = float(values.max()) or 1.0
    parts = heading(title, subtitle)
    small = min(FONT - 1, int(size * 0.8))
    for i, name in enumerate(names):
        middle = top + (i + 0.5) * size
        parts.append(text(left - 6, middle + 4, shortened(f"{i + 1} {name}", _LABEL), anchor="end", size=small))
        parts.append(text(left + (i + 0.5) * size, top - 5, str(i + 1), anchor="middle", size=small))
        for j in range(count):
            share = values[i, j] / highest
            said = hint(f"{i + 1}, {j + 1}: {number(values[i, j])}")
            parts.append(rectangle(left + j * size, top + i * size, size, size, fill=_blue(share), content=said))
            if size >= 38 and i != j:
                ink = "#ffffff" if share > 0.55 else INK
                at = left + (j + 0.5) * size
                parts.append(text(at, middle + 4, f"{values[i, j]:.2g}", anchor="middle", size=10, fill=ink))
    right, height = left + count * size, max(count * size, 150.0)
    parts += _colour_bar(right + 24, top, highest, unit)
    return picture(right + 60 + width_of(unit) + 40, top + height + 16, parts, title)


def _mark(
    frame: Frame,
    y: float,
    slot: float,
    value: float,
    interval: tuple[float, float] | None,
    i: int,
    kind: str,
    what: str,
) -> list[str]:
    """A bar or a dot, and its interval."""
    if not math.isfinite(value):
        return [text(frame.x.start + 4, y + slot - 5, "not defined", fill=GREY, size=FONT - 2)]
    colour, middle = COLOURS[i % len(COLOURS)], y + slot / 2
    words = f"{what}: {number(value)}"
    if kind == "bars":
        zero, end = sorted([frame.x(0), frame.x(value)])
        parts = [
            rectangle(zero, y + 2, max(end - zero, 0.5), slot - 4, fill=colour, fill_opacity=0.85, content=hint(words))
        ]
    else:
        parts = [_dot(frame.x(value), middle, colour, words, radius=4.0)]
    if interval is not None:
        low, high = (frame.x(v) for v in interval)
        parts.append(line(low, middle, high, middle, stroke=INK, stroke_width=1.4))
        parts += [line(at, middle - 4, at, middle + 4, stroke=INK, stroke_width=1.4) for at in (low, high)]
    return parts


def _dot(x: float, y: float, colour: str, words: str, radius: float = 2.5) -> str:
    return element("circle", hint(words), cx=float(x), cy=float(y), r=radius, fill=colour)


def _colour_bar(x: float, top: float, highest: float, unit: str) -> list[str]:
    steps, height = 40, 140.0
    parts = [text(x, top - 14, unit)]
    for k in range(steps):
        parts.append(rectangle(x, top + k * height / steps, 16, height / steps + 0.5, fill=_blue(1 - k / (steps - 1))))
    marks = ((0.0, highest), (0.5, highest / 2), (1.0, 0.0))
    return parts + [text(x + 22, top + 4 + share * height, number(value)) for share, value in marks]


def _blue(share: float) -> str:
    """From nearly white (0) to dark blue (1): one hue, so that only lightness tells values apart."""
    light, dark = (247, 251, 255), (8, 48, 107)
    return "#" + "".join(f"{round(a + (b - a) * min(max(share, 0), 1)):02x}" for a, b in zip(light, dark, strict=True))


def _finite(one: Line) -> list[tuple[float, float]]:
    points = [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if len(points) <= _MOST_POINTS:
        return points
    return [points[round(k * (len(points) - 1) / (_MOST_POINTS - 1))] for k in range(_MOST_POINTS)]


def _frame(x: tuple[float, float], y: tuple[float, float], small: bool) -> Frame:
    width, height = (_SMALL_WIDTH, _SMALL_HEIGHT) if small else (_WIDTH, _HEIGHT)
    return Frame(Scale(*x, _LEFT, _LEFT + width), Scale(*y, _TOP + height, _TOP))


def _with_legend(parts: list[str], keys: Sequence[Key], title: str, frame: Frame) -> str:
    """The picture, with a legend to its right where it has keys."""
    width, bottom = frame.x.end + 24, frame.y.start
    if keys:
        parts = [*parts, *legend(keys, frame.x.end + 20, _TOP + 12)]
        width, bottom = width + legend_width(keys), max(bottom, _TOP + 18.0 * len(keys))
    return picture(width, bottom + _BOTTOM, parts, title)
