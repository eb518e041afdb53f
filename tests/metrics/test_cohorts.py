"""Counting cohorts against loops over rows, and the choice: minimums, order, measures, head and tail."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dist_rec.data.cohorts import Axis
from dist_rec.metrics.axes import CutAxis
from dist_rec.metrics.cohorts import Bins, Division, Tally, choose, divide, to_mapping

AGE, SEX = CutAxis(Axis("age", (18, 30)), (0, 1, 2)), CutAxis(Axis("sex"), (-1, 4))
BINS = Bins(-2.0, 2.0, 8)


def batch(seed: int, rows: int = 50) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, labels, weights (some 0) and groups."""
    g = torch.Generator().manual_seed(seed)
    groups = {
        "age": torch.randint(10, 50, (rows,), generator=g),
        "sex": torch.randint(0, 2, (rows,), generator=g) * 5 - 1,
    }
    weights = torch.randint(0, 3, (rows,), generator=g) / 2
    groups["sex"][weights == 0] = 99  # as in padding, a value that no cohort has
    return 2 * torch.randn(rows, generator=g), torch.randint(0, 2, (rows,), generator=g).float(), weights, groups


def test_a_tally_counts_what_a_loop_counts() -> None:
    tally = Tally((AGE, SEX), BINS, torch.device("cpu"))
    expected = np.zeros((6, 9), np.int64)
    for seed in range(3):
        logits, labels, weights, groups = batch(seed)
        tally.add(logits, labels, weights, groups)
        for i in range(len(weights)):
            if weights[i] > 0:
                age = sum(int(groups["age"][i]) >= edge for edge in (18, 30))
                cohort = 2 * age + {-1: 0, 4: 1}[int(groups["sex"][i])]
                place = min(max(math.floor((float(logits[i]) + 2) / 0.5), 0), 7)
                expected[cohort, place] += 1
                expected[cohort, 8] += int(labels[i])
    assert tally.counts.numpy().tolist() == expected.tolist()
    assert BINS.centres.tolist() == [-1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25, 1.75]


def counts(rows: dict[int, tuple[int, int, int]], cohorts: int = 6) -> np.ndarray:
    """(cohorts, 9): cohort -> (bin, rows, positives)."""
    result = np.zeros((cohorts, 9), np.int64)
    for cohort, (place, number, positives) in rows.items():
        result[cohort, place], result[cohort, 8] = number, positives
    return result


def division(rows: dict[int, tuple[int, int, int]], min_rows: float = 0, min_positives: int = 0) -> Division:
    return divide((AGE, SEX), counts(rows), BINS, "wasserstein", min_rows=min_rows, min_positives=min_positives)


def test_the_most_different_pair_and_which_is_the_head() -> None:
    # bins 1, 6 and 4: the first two are furthest apart, and the second predicts more
    found = choose([division({0: (1, 100, 5), 3: (6, 200, 9), 5: (4, 50, 9)})])
    assert found is not None and found.divergence == pytest.approx(5 * 0.5)
    assert found.head.cells == {"age": 1, "sex": 4} and found.head.name == "18 <= age < 30, sex = 4"
    assert found.tail.cells == {"age": 0, "sex": -1}
    assert (found.head.rows, found.head.positives, found.head.mean) == (200, 9, 1.25)
    assert [cohort.rows for cohort in found.division.cohorts] == [100, 200, 50] and not found.division.others


@pytest.mark.parametrize(
    ("minimums", "head", "tail"),
    [
        ({}, 3, 0),
        ({"min_rows": 60}, 3, 0),
        ({"min_rows": 101}, None, None),
        ({"min_positives": 6}, 3, 5),
        ({"min_rows": 60, "min_positives": 6}, None, None),
    ],
)
def test_cohorts_below_the_minimums_are_passed_over(minimums: dict, head: int | None, tail: int | None) -> None:
    one = division({0: (1, 100, 5), 3: (6, 200, 9), 5: (4, 50, 9)}, **minimums)
    assert len(one.cohorts) + len(one.others) == 3
    found = choose([one])
    number = {(0, -1): 0, (1, 4): 3, (2, 4): 5}
    if head is None:
        assert found is None and one.best is None
    else:
        assert found is not None
        got = [number[tuple(cohort.cells.values())] for cohort in (found.head, found.tail)]
        assert got == [head, tail]


@pytest.mark.parametrize("measure", ["js", "kl", "wasserstein", "cosine"])
def test_the_choice_does_not_depend_on_how_cohorts_are_numbered(measure: str) -> None:
    rng = np.random.default_rng(3)
    values = tuple(range(10, 16))
    table = np.concatenate([rng.integers(1, 500, (6, 8)), rng.integers(0, 9, (6, 1))], axis=1)
    axis = CutAxis(Axis("a"), values)
    settings = {"min_rows": 0.0, "min_positives": 0}
    first = choose([divide((axis,), table, BINS, measure, **settings)])
    order = rng.permutation(6)
    second = choose([divide((axis,), table[order], BINS, measure, **settings)])
    assert first is not None and second is not None
    for a, b in ((first.head, second.head), (first.tail, second.tail)):
        assert order[values.index(b.cells["a"])] == values.index(a.cells["a"])
        assert a.histogram.tolist() == b.histogram.tolist()
    assert first.divergence == second.divergence


def test_of_equal_pairs_the_larger_wins_then_the_lower_cells() -> None:
    found = choose([division({0: (1, 10, 0), 2: (3, 10, 0), 3: (5, 90, 0), 5: (1, 20, 0)})])
    assert found is not None and [found.head.rows, found.tail.rows] == [90, 20]
    found = choose([division({0: (1, 10, 0), 2: (1, 10, 0), 3: (5, 90, 0)})])
    assert found is not None and found.tail.cells == {"age": 0, "sex": -1}


def test_of_several_divisions_the_most_different_wins_and_none_is_none() -> None:
    near, far = division({0: (1, 9, 1), 1: (2, 9, 1)}), division({0: (1, 9, 1), 1: (3, 9, 1)})
    alone = division({0: (1, 9, 1)})
    for divisions in ([near, far, alone], [alone, far, near], [far, far]):
        found = choose(divisions)
        assert found is not None and found.division is far
    assert choose([alone]) is None and choose([]) is None


def test_what_the_file_says_adds_up() -> None:
    one = division({0: (1, 100, 5), 3: (6, 200, 9), 5: (4, 50, 1)}, min_positives=2)
    found = choose([one])
    assert found is not None
    said = to_mapping(found, [one], BINS, "wasserstein")
    assert said["axes"] == ["age", "sex"] and said["edges"] == {"age": [18, 30], "sex": None}
    assert (said["head_mass"], said["head_rate"]) == (200 / 350, 9 / 350)
    assert (said["tail_mass"], said["tail_rate"]) == (100 / 350, 5 / 350)
    assert (said["rows"], said["positives"]) == (350, 15)
    assert [c["base_rate"] for c in said["cohorts"]] == [0.05, 0.045]
    assert said["divergence"]["matrix"] == [[0, 2.5], [2.5, 0]] and said["divergence"]["of_head_and_tail"] == 2.5
    assert said["histograms"]["all"] == [0, 100, 0, 0, 50, 0, 200, 0] and sum(said["histograms"]["head"]) == 200
    (searched,) = said["searched"]
    assert (searched["cohorts"], searched["below_minimums"], searched["head"]) == (2, 1, "18 <= age < 30, sex = 4")
