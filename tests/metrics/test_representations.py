"""Correlation and diversity of representations: by hand, their extremes, and N ranks together against one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_rec.metrics.representations import Moments, chosen, describe, diversity
from dist_rec.settings import ConfigError
from tests.ranks import run_ranks

ROWS, WIDTH = 60, 5


def columns(seed: int, rows: int = ROWS, width: int = WIDTH) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def moments(x: torch.Tensor, weights: torch.Tensor | None = None, steps: int = 1) -> Moments:
    result, weights = Moments(), torch.ones(len(x)) if weights is None else weights
    for rows, w in zip(x.chunk(steps), weights.chunk(steps), strict=True):
        result.add(rows, w)
    return result


def of(*representations: torch.Tensor) -> dict[str, float]:
    widths = {f"e{i}": r.shape[1] for i, r in enumerate(representations)}
    return describe(moments(torch.cat(representations, dim=1)).correlation(), widths)


@pytest.mark.parametrize("steps", [1, 4])
def test_correlation_is_numpys_with_weights_and_without_padding(steps: int) -> None:
    x, w = columns(0) * 3 + 7, torch.rand(ROWS, generator=torch.Generator().manual_seed(1))
    w[-9:] = 0
    x[-9:] = math.inf  # what a model makes of padding is of no account
    covariance = np.cov(x[:-9].double().numpy(), rowvar=False, aweights=w[:-9].double().numpy())
    deviations = np.sqrt(covariance.diagonal())
    found = moments(x, w, steps).correlation()
    np.testing.assert_allclose(found, covariance / np.outer(deviations, deviations), atol=1e-12)


def test_mean_correlation_by_hand() -> None:
    a = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    b = -2 * a[:, :1] + 5
    c = a[:, 1:] + a[:, :1]  # correlates with each column of a at 1 / sqrt(2), with b at -1 / sqrt(2)
    found = of(a, b, c)
    assert found["correlation/e0~e1"] == pytest.approx((1 + 0) / 2)
    assert found["correlation/e0~e2"] == pytest.approx(math.sqrt(0.5))
    assert found["correlation/e1~e2"] == pytest.approx(math.sqrt(0.5))
    assert found["correlation"] == pytest.approx((0.5 + 2 * math.sqrt(0.5)) / 3)


def test_constant_columns_are_left_out() -> None:
    a, b = columns(0), columns(1)
    dead = torch.full((ROWS, 1), 0.7)
    plain, with_dead = of(a, b), of(torch.cat([dead, a], dim=1), torch.cat([b, dead], dim=1))
    assert with_dead == pytest.approx(plain)
    all_dead = of(a, dead)
    assert math.isnan(all_dead["correlation"]) and math.isnan(all_dead["diversity_qjsd"])
    one_dead = of(a, dead, b)
    assert one_dead["correlation"] == pytest.approx(plain["correlation"])
    assert one_dead["diversity_qjsd"] == pytest.approx(plain["diversity_qjsd"])


def test_columns_that_are_not_finite_are_left_out_like_constant_ones() -> None:
    a, b = columns(0), columns(1)
    broken = a.clone()
    broken[3, 0], broken[4, 1] = math.nan, math.inf
    assert of(broken, b) == pytest.approx(of(a[:, 2:], b))


def test_independent_outputs_have_the_correlation_that_chance_gives() -> None:
    n = 4096
    found = of(*(columns(seed, rows=n, width=16) for seed in range(3)))
    assert found["correlation"] == pytest.approx(math.sqrt(2 / (math.pi * n)), rel=0.1)
    assert found["diversity_qjsd"] > 0.99


def test_diversity_is_zero_for_equal_and_one_for_uncorrelated_representations() -> None:
    q, _ = torch.linalg.qr(torch.cat([torch.ones(ROWS, 1), columns(3, width=8)], dim=1).double())
    apart = q[:, 1:]  # orthogonal to each other and to the constant: uncorrelated
    assert of(apart[:, :4], apart[:, 4:])["diversity_qjsd"] == pytest.approx(1, abs=1e-9)
    assert of(apart[:, :2], apart[:, 2:5], apart[:, 5:])["diversity_qjsd"] == pytest.approx(1, abs=1e-9)
    a = columns(0)
    same = of(a, a[:, [3, 1, 0, 4, 2]] * -2.5 + 4, a * 7)
    assert same["diversity_qjsd"] == pytest.approx(0, abs=1e-9)
    assert same["correlation"] < 0.5, "the columns of a are unlike each other: the mean |correlation| does not see it"
    half = of(torch.cat([a[:, :3], columns(1)[:, :2]], dim=1), torch.cat([a[:, :3], columns(2)[:, :2]], dim=1))
    assert 0.1 < half["diversity_qjsd"] < 0.9


def test_diversity_by_hand() -> None:
    # two representations of one column, correlated at r: eigenvalues of C are (1 + r) / 2 and (1 - r) / 2
    r = 0.6
    p = np.array([(1 + r) / 2, (1 - r) / 2])
    expected = -(p * np.log(p)).sum() / math.log(2)
    found = diversity(np.array([[1, r], [r, 1]]), [slice(0, 1), slice(1, 2)])
    assert found == pytest.approx(expected, rel=1e-12)


def test_names_and_patterns() -> None:
    widths = {"shared": 4, "expert_0": 2, "expert_1": 2}
    assert chosen([], widths) == {}
    assert chosen(["expert_*"], widths) == {"expert_0": 2, "expert_1": 2}
    assert list(chosen(["expert_1", "shared"], widths)) == ["shared", "expert_1"]
    for patterns, text in [(["expert_*", "gate"], "has 'gate', which matches no"), (["shared"], "names shared alone")]:
        with pytest.raises(ConfigError, match=rf"metrics\.correlation: {text}.* has shared, expert_0, expert_1"):
            chosen(patterns, widths)


def on_ranks(rank: int, world_size: int) -> Any:
    x = torch.cat([columns(seed) for seed in range(3)], dim=1)
    weights = torch.ones(ROWS)
    weights[50:] = 0  # the last rank's rows are padding for the most part
    per_rank = ROWS // world_size
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    return moments(x[mine], weights[mine], steps=2).correlation(dist.new_group(backend="gloo"))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_equal_one_rank(world_size: int) -> None:
    expected = moments(torch.cat([columns(seed) for seed in range(3)], dim=1)[:50]).correlation()
    for found in run_ranks(on_ranks, world_size):
        np.testing.assert_allclose(found, expected, atol=1e-13)
