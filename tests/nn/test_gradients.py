"""Gradients as vectors: the decomposition of C2AL (papers: 1d.6) and PCGrad's surgery, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_rec.nn.gradients import decompose, gradient, split, without_conflicts


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gradient_is_flat_and_0_where_a_loss_does_not_reach() -> None:
    torch.manual_seed(0)
    layer, other, x = nn.Linear(3, 2), nn.Parameter(torch.ones(4)), torch.randn(5, 3)
    parameters = [*layer.parameters(), other]
    loss = layer(x).square().sum()
    found = gradient(loss, parameters)
    assert torch.equal(found, gradient(loss, parameters)), "the graph is kept"
    loss.backward()
    expected = torch.cat([layer.weight.grad.flatten(), layer.bias.grad, torch.zeros(4)])
    torch.testing.assert_close(found, expected)
    for part, p in zip(split(found, parameters), parameters, strict=True):
        torch.testing.assert_close(part, torch.zeros_like(p) if p.grad is None else p.grad)


def test_decomposition_is_orthogonal_and_complete() -> None:
    torch.manual_seed(1)
    auxiliary, primary = torch.randn(1000, dtype=torch.float64), torch.randn(1000, dtype=torch.float64)
    parallel, orthogonal = decompose(auxiliary, primary)
    assert abs(orthogonal @ primary) < 1e-9 * auxiliary.norm() * primary.norm()
    torch.testing.assert_close(parallel + orthogonal, auxiliary)
    torch.testing.assert_close(parallel @ parallel + orthogonal @ orthogonal, auxiliary @ auxiliary)
    torch.testing.assert_close(parallel, (parallel @ primary) / (primary @ primary) * primary)
    none, everything = decompose(auxiliary, torch.zeros_like(primary))
    assert none.abs().sum() == 0 and torch.equal(everything, auxiliary)


def test_two_gradients_that_conflict_are_each_projected() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    # a loses its part along b, (1/2, -1/2), and b its part along a
    expected = torch.tensor([0.5, 0.5]) + torch.tensor([0.0, 1.0])
    torch.testing.assert_close(without_conflicts(torch.stack([a, b]), draws()), expected)


@pytest.mark.parametrize("seed", range(4))
def test_gradients_that_agree_are_added_up(seed: int) -> None:
    gradients = torch.tensor([[1.0, 0, 2], [0, 3, 1], [1, 1, 1]])
    torch.testing.assert_close(without_conflicts(gradients, draws(seed)), gradients.sum(0))


def test_the_result_of_two_points_against_neither_and_of_three_depends_on_the_order_alone() -> None:
    torch.manual_seed(2)
    for _ in range(50):
        two = torch.randn(2, 3)
        assert (two @ without_conflicts(two, draws()) > -1e-5).all()
    three = torch.tensor([[1.0, 0.2, 0], [-1.0, 1, 0.3], [-0.6, -1, 1]])
    found = {tuple(without_conflicts(three, draws(seed)).tolist()) for seed in range(30)}
    assert 1 < len(found) <= 8  # two orders for each of three
    assert torch.equal(without_conflicts(three, draws(5)), without_conflicts(three, draws(5)))


def test_a_gradient_of_0_takes_nothing_away() -> None:
    gradients = torch.tensor([[1.0, 0], [0, 0], [-1.0, 1]])
    assert torch.equal(without_conflicts(gradients, draws()), without_conflicts(gradients[[0, 2]], draws()))
