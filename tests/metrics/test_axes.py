"""Axes: what a user may write, what is wrong with it, and the cohorts that rows are cut into."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from dist_rec.data.cohorts import Axis
from dist_rec.metrics.axes import AxisError, Cut, CutAxis, Ranks, check_cuts, cut_axes, parse_cut

ALONE = Ranks(every=lambda value: [value], total=lambda counts: counts)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("age", Cut("age")),
        ("age:10", Cut("age", parts=10)),
        ("age:5%", Cut("age", tail=Fraction(1, 20))),
        ("age:2.5%", Cut("age", tail=Fraction(1, 40))),
        ("age:18/25/35", Cut("age", edges=(18, 25, 35))),
        ("age:-3/0", Cut("age", edges=(-3, 0))),
    ],
)
def test_what_a_user_writes(text: str, cut: Cut) -> None:
    assert parse_cut(text) == cut


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (":10", "names no group"),
        ("", "names no group"),
        ("age:", "after the colon write parts (10), tails (5%) or edges (18/25/35)"),
        ("age:ten", "after the colon"),
        ("age:1", "2 to 100 parts"),
        ("age:1000", "2 to 100 parts"),
        ("age:50%", "0 to 50 %"),
        ("age:0%", "0 to 50 %"),
        ("age:5/5", "do not ascend"),
        ("age:7/3", "do not ascend"),
        (f"age:0/{2**63}", "int64"),
    ],
)
def test_what_is_wrong_is_said(text: str, problem: str) -> None:
    found = parse_cut(text)
    assert isinstance(found, str) and f"'{text}'" in found
    assert problem in found


def test_axes_that_the_schema_does_not_have() -> None:
    cuts = [parse_cut(text) for text in ("aeg:10", "age", "age:5%", "zzz", "age:x")]
    texts = [c.text for c in check_cuts(cuts, ["age", "gender"])]
    assert len(texts) == 4 and all(c.key == "axes" for c in check_cuts(cuts, ["age"]))
    assert "names 'aeg', which is no group of the run's schema; did you mean 'age'?" in texts[0]
    assert "'age' twice" in texts[1] and "known: age, gender" in texts[2] and "after the colon" in texts[3]


def cut(text: str, values: np.ndarray, parts: int = 3, max_values: int = 100) -> CutAxis | AxisError:
    """The only cut of an axis "a", its rows in some chunks."""
    parsed = parse_cut(text)
    assert isinstance(parsed, Cut)

    def scan() -> Iterator[dict[str, np.ndarray]]:
        for chunk in np.array_split(values, parts):
            yield {"a": chunk}

    (found,) = cut_axes([parsed], scan, ALONE, max_values)
    return found


def sizes(axis: CutAxis | AxisError, values: np.ndarray) -> list[int]:
    """Rows of each cohort."""
    assert isinstance(axis, CutAxis)
    return np.bincount(axis.numbers(torch.from_numpy(values)).numpy(), minlength=len(axis.cells)).tolist()


def test_parts_of_different_values_are_equal() -> None:
    values = np.random.default_rng(0).permutation(1000) * 3 - 700
    axis = cut("a:10", values)
    assert sizes(axis, values) == [100] * 10
    assert isinstance(axis, CutAxis) and axis.axis.edges == tuple(300 * k - 700 for k in range(1, 10))


def test_tails_have_their_share() -> None:
    values = np.random.default_rng(0).permutation(1000)
    assert sizes(cut("a:5%", values), values) == [50, 900, 50]
    assert cut("a:5%", np.repeat(values, 3)) == CutAxis(Axis("a", (50, 950)), (0, 1, 2))
    assert sizes(cut("a:2.5%", values), values) == [25, 950, 25]


def test_equal_values_stay_together() -> None:
    values = np.concatenate([np.zeros(600, np.int64), np.arange(1, 401)])
    axis = cut("a:10", values)
    # the first five edges are all 0, below which there is nothing
    assert sizes(axis, values) == [600, 100, 100, 100, 100]
    values = np.concatenate([np.zeros(970, np.int64), np.ones(30, np.int64)])
    said = cut("a:10", values)
    assert isinstance(said, AxisError) and "values lie in 0..1 and most are equal" in str(said)
    assert cut("a", values) == CutAxis(Axis("a"), (0, 1))


def test_edges_are_kept_as_given() -> None:
    values = np.arange(20, 60)
    axis = cut("a:18/25/35", values)
    assert sizes(axis, values) == [0, 5, 10, 25]
    assert isinstance(cut("a:70/80", values), AxisError)


def test_values() -> None:
    values = np.array([7, -1, 7, 3])
    axis = cut("a", values)
    assert axis == CutAxis(Axis("a"), (-1, 3, 7)) and sizes(axis, values) == [1, 1, 2]
    many = np.arange(101)
    for parts in (1, 50):
        said = cut("a", many, parts)
        assert isinstance(said, AxisError) and "more than 100 different values; cut it into parts with a:10" in str(
            said
        )
    assert isinstance(cut("a", many, max_values=101), CutAxis)
    assert "is 5 in every row" in str(cut("a", np.full(9, 5)))
    assert "no row with weight > 0" in str(cut("a", np.empty(0, np.int64)))


def test_cohorts_in_words() -> None:
    axis = CutAxis(Axis("a", (3, 9)), (0, 1, 2))
    assert [axis.describe(cell) for cell in axis.cells] == ["a < 3", "3 <= a < 9", "a >= 9"]
    assert CutAxis(Axis("a"), (-1, 7)).describe(7) == "a = 7"
