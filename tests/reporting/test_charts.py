"""Pictures are well-formed, say what they show, and put values where the axes say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from xml.etree import ElementTree

import numpy as np
import pytest

from dist_rec.reporting.charts import Histogram, Line, Row, heat_map, histogram_chart, line_chart, row_chart
from dist_rec.reporting.svg import COLOURS, Scale, document, extent, number, ticks


def parsed(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


def words(picture: str) -> list[str]:
    return [element.text or "" for element in parsed(picture).iter() if element.tag.endswith("text")]


def elements(picture: str, tag: str, **attributes: str) -> Iterator[ElementTree.Element]:
    for element in parsed(picture).iter(tag):
        if all(element.get(name) == value for name, value in attributes.items()):
            yield element


def axis(picture: str, anchor: str) -> Scale:
    """The scale that the first and last tick labels tell: of x (anchor middle) or of y (anchor end)."""
    of_x = anchor == "middle"
    found = []
    for element in elements(picture, "text", **{"text-anchor": anchor}):
        try:
            value = float(element.text or "")
        except ValueError:
            continue
        found.append((value, float(element.get("x" if of_x else "y") or 0) - (0 if of_x else 4)))
    return Scale(found[0][0], found[-1][0], found[0][1], found[-1][1])


def points(path: ElementTree.Element) -> np.ndarray:
    numbers = (path.get("d") or "").replace("M", "").replace("L", "").split()
    return np.array(numbers, float).reshape(-1, 2)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1, 5) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(0.8713, 0.9031) == [0.875, 0.88, 0.885, 0.89, 0.895, 0.9]
    assert ticks(-3, 12) == [0, 5, 10]
    assert ticks(5, 5) == [5]
    for low, high in ((0, 123_456), (-1e-7, 2e-7), (1e9, 1.0001e9)):
        found = ticks(low, high)
        assert 3 <= len(found) <= 9 and all(low <= t <= high for t in found)
        assert np.allclose(np.diff(found), found[1] - found[0])


def test_numbers_are_short() -> None:
    shown = [number(v) for v in (0, 0.05, 1234, 12_000, 3_500_000, 2e9, 2e-5, -0.5, math.nan)]
    assert shown == ["0", "0.05", "1234", "12k", "3.5M", "2G", "2e-05", "-0.5", "–"]


def test_the_extent_of_nothing_and_of_one_value_is_not_empty() -> None:
    for values in ([], [math.nan], [3.0], [0.0, 0.0]):
        low, high = extent(values)
        assert low < high
    assert extent([0, 10], 0.1) == (-1, 11)


def test_lines_lie_where_the_axes_say() -> None:
    x, y = [0.0, 50.0, 100.0], [0.25, 0.75, 0.5]
    other = Line("second & last", [0.0, 100.0], [0.25, math.nan])
    picture = line_chart("A title", [Line("first", x, y), other], "examples", "NE", "more <words>")
    assert {"A title", "first", "second & last", "examples", "NE", "more <words>"} <= set(words(picture))
    (drawn,) = elements(picture, "path")  # of the second, one point is left, which makes no line
    across, up = axis(picture, "middle"), axis(picture, "end")
    np.testing.assert_allclose(points(drawn), [(across(a), up(b)) for a, b in zip(x, y, strict=True)], atol=0.5)
    assert len(list(elements(picture, "circle", fill=COLOURS[0]))) == 3
    assert len(list(elements(picture, "circle", fill=COLOURS[1]))) == 1


def test_the_legend_leaves_out_what_has_no_line() -> None:
    picture = line_chart("t", [Line("silent", [], []), Line("said", [0.0, 1.0], [0.0, 1.0])], "x", "y")
    assert "said" in words(picture) and "silent" not in words(picture)
    assert [p.get("stroke") for p in elements(picture, "path")] == [COLOURS[1]], "a run keeps its colour"


def test_long_lines_are_thinned_but_keep_their_ends() -> None:
    x = np.arange(10_000.0)
    picture = line_chart("t", [Line("a", x.tolist(), x.tolist())], "x", "y")
    (drawn,) = elements(picture, "path")
    assert len(points(drawn)) == 400
    across = axis(picture, "middle")
    assert across.low <= 0 and points(drawn)[-1][0] == pytest.approx(across.end + (9999 - 8000) * 0.04, abs=30)


def test_every_line_of_a_chart_looks_different() -> None:
    lines = [Line(str(i), [0.0, 1.0], [0.0, float(i)]) for i in range(28)]
    looks = {(p.get("stroke"), p.get("stroke-dasharray")) for p in elements(line_chart("t", lines, "x", "y"), "path")}
    assert len(looks) == 28


def test_a_histograms_steps_have_its_heights_and_empty_ends_are_cut_off() -> None:
    heights = np.array([0, 0, 0.25, 0.75, 0])
    picture = histogram_chart("t", np.arange(6), [Histogram("h", heights, "#123456")], "x", "share")
    (drawn,) = elements(picture, "path", stroke="#123456")
    across, up = axis(picture, "middle"), axis(picture, "end")
    corners = [(2, 0), (2, 0.25), (3, 0.25), (3, 0.75), (4, 0.75), (4, 0)]
    np.testing.assert_allclose(points(drawn), [(across(x), up(y)) for x, y in corners], atol=0.5)


def test_bars_begin_at_0_and_intervals_lie_around_their_ends() -> None:
    rows = [Row("one", [2.0, -1.0], [(1.5, 2.5), None]), Row("none", [math.nan, 0.5])]
    picture = row_chart("t", rows, ["a", "b"], "%", kind="bars")
    across = axis(picture, "middle")
    (bar,) = elements(picture, "rect", fill=COLOURS[0], **{"fill-opacity": "0.85"})
    start, width = (float(bar.get(name) or 0) for name in ("x", "width"))
    assert start == pytest.approx(across(0), abs=0.5) and start + width == pytest.approx(across(2), abs=0.5)
    first, _ = elements(picture, "rect", fill=COLOURS[1], **{"fill-opacity": "0.85"})
    assert float(first.get("x") or 0) == pytest.approx(across(-1), abs=0.5)
    (interval,) = [e for e in elements(picture, "line", **{"stroke-width": "1.4"}) if e.get("y1") == e.get("y2")]
    ends = [float(interval.get(name) or 0) for name in ("x1", "x2")]
    assert ends == pytest.approx([across(1.5), across(2.5)], abs=0.5)
    assert "not defined" in words(picture) and {"one", "none", "a", "b"} <= set(words(picture))


def test_dots_need_no_0() -> None:
    picture = row_chart("t", [Row("one", [0.9, 0.91])], ["a", "b"], "NE", kind="dots", first_colour=1)
    across = axis(picture, "middle")
    assert across.low > 0.8
    for value, colour in ((0.9, COLOURS[1]), (0.91, COLOURS[2])):
        (dot,) = elements(picture, "circle", fill=colour)
        assert float(dot.get("cx") or 0) == pytest.approx(across(value), abs=0.5)


@pytest.mark.parametrize("count", [2, 60])
def test_a_heat_map_has_a_cell_for_each_pair_darkest_where_it_is_largest(count: int) -> None:
    matrix = np.random.default_rng(0).random((count, count)) * 0.5
    matrix[1, 0] = 1.0
    picture = heat_map("t", [f"cohort {i}" for i in range(count)], matrix, "nats")
    cells = [e for e in elements(picture, "rect") if (e.find("title")) is not None]
    assert len(cells) == count**2
    dark = [e for e in cells if e.get("fill") == "#08306b"]
    assert [e.find("title").text for e in dark] == ["2, 1: 1"]  # type: ignore[union-attr]
    assert {"1 cohort 0", "2 cohort 1", "nats"} <= set(words(picture))


def test_a_document_is_a_file_of_all_its_pictures() -> None:
    one = line_chart("first", [Line("a", [0.0, 1.0], [0.0, 1.0])], "x", "y")
    two = heat_map("second", ["a", "b"], [[0, 1], [1, 0]], "nats")
    root = ElementTree.fromstring(document([one, two]))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join(root.itertext())
    assert "first" in text and "second" in text
    heights = [int(parsed(p).get("height") or 0) for p in (one, two)]
    assert int(root.get("height") or 0) == pytest.approx(sum(heights), abs=1)
    moves = [g.get("transform") for g in root.iter("{http://www.w3.org/2000/svg}g")]
    assert moves == ["translate(0 0)", f"translate(0 {heights[0]})"]
