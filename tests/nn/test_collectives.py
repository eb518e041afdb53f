"""Sums over ranks: their values and their gradients, against one rank that has everything."""

from __future__ import annotations

import pytest
import torch

from dist_rec.nn.collectives import num_ranks, rank, sum_over_ranks, total
from tests.ranks import run_ranks


def test_without_a_process_group_there_is_one_rank() -> None:
    x = torch.randn(3, requires_grad=True)
    assert (num_ranks(), rank()) == (1, 0)
    assert torch.equal(total(x), x) and not total(x).requires_grad
    assert torch.equal(sum_over_ranks(x), x) and sum_over_ranks(x).requires_grad


def _gradients(here: int, world_size: int, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's gradients of a loss that all ranks compute alike, twice, and of one that they do not."""
    found = []
    for alike in (True, False):
        x = parts[here].clone().requires_grad_()
        sum_over_ranks(x, alike=alike).exp().sum().backward()
        found.append(x.grad)
    x = parts[here].clone().requires_grad_()
    (sum_over_ranks(x).exp().sum() * (here + 1) + x.square().sum()).backward()
    assert torch.equal(total(x), parts.sum(0)) and rank() == here and num_ranks() == world_size
    return found[0], found[1], x.grad


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_mean_over_ranks_has_the_gradient_of_one_rank(world_size: int) -> None:
    torch.manual_seed(0)
    parts = torch.randint(-2, 3, (world_size, 4)).float()  # whole numbers: sums are exact in any order
    results = run_ranks(_gradients, world_size, parts)
    whole = parts.clone().requires_grad_()
    whole.sum(0).exp().sum().backward()
    own = parts.clone().requires_grad_()
    losses = [own.sum(0).exp().sum() * (r + 1) + own[r].square().sum() for r in range(world_size)]
    torch.stack(losses).mean().backward()
    for r, (alike, exchanged, unlike) in enumerate(results):
        # data parallelism divides by the number of ranks
        torch.testing.assert_close(alike / world_size, whole.grad[r])
        torch.testing.assert_close(exchanged / world_size, whole.grad[r])
        torch.testing.assert_close(unlike / world_size, own.grad[r])
