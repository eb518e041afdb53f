"""The blocked softmax loss against torch's, its gradient, and the gather with gradients on several ranks."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from dist_rec.nn.gather import gather
from dist_rec.nn.softmax import softmax_loss
from tests.ranks import run_ranks

B, C, V = 7, 23, 5


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    rows, columns = torch.randn(B, V, generator=g, dtype=dtype), torch.randn(C, V, generator=g, dtype=dtype)
    positive = torch.randperm(C, generator=g)[:B]
    column_ids = torch.randint(0, 6, (C,), generator=g)
    bias = torch.randn(C, generator=g, dtype=dtype)
    bias[(torch.arange(C) == 4) & ~torch.isin(torch.arange(C), positive)] = -torch.inf
    return rows.requires_grad_(), columns.requires_grad_(), positive, column_ids[positive], column_ids, bias


def _reference(rows, columns, positive, row_ids, column_ids, bias, temperature) -> torch.Tensor:
    logits = rows @ columns.T / temperature + bias
    same = (row_ids[:, None] == column_ids) & (torch.arange(C) != positive[:, None])
    return torch.nn.functional.cross_entropy(logits.masked_fill(same, -torch.inf), positive, reduction="none")


@pytest.mark.parametrize("max_logits", [1, 3 * C, 10**6])
def test_losses_and_gradients_are_those_of_cross_entropy_however_it_is_blocked(max_logits):
    rows, columns, positive, row_ids, column_ids, bias = _inputs()
    weights = torch.rand(B)
    expected = _reference(rows, columns, positive, row_ids, column_ids, bias, 0.3)
    found = softmax_loss(
        rows, columns, positive, temperature=0.3, bias=bias, row_ids=row_ids, column_ids=column_ids,
        max_logits=max_logits,
    )  # fmt: skip
    assert not torch.isinf(expected).any()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad((expected * weights).sum(), (rows, columns))
    for one, two in zip(torch.autograd.grad((found * weights).sum(), (rows, columns)), wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_row_for_which_no_column_counts_gives_no_gradient_when_its_loss_is_left_out():
    rows, columns, positive, *_ = _inputs()
    found = softmax_loss(rows, columns, positive, temperature=0.3, bias=torch.full((C,), -torch.inf))
    found.masked_fill(torch.ones(B, dtype=torch.bool), 0).sum().backward()
    assert rows.grad is not None and not rows.grad.any() and not columns.grad.any()


@pytest.mark.parametrize("max_logits", [2 * C, B * C])
def test_the_gradient_in_double_precision(max_logits):
    rows, columns, positive, row_ids, column_ids, bias = _inputs(torch.float64)
    assert torch.autograd.gradcheck(
        lambda r, c: softmax_loss(
            r, c, positive, temperature=0.3, bias=bias, row_ids=row_ids, column_ids=column_ids, max_logits=max_logits
        ),
        (rows, columns),
    )


@pytest.mark.parametrize(("allowed", "largest", "computed"), [(2 * C + 3, 2 * C, 2 * B * C), (B * C, B * C, B * C)])
def test_no_more_logits_than_allowed_are_in_memory(monkeypatch, allowed, largest, computed):
    from dist_rec.nn import softmax

    sizes, alive, block = [], [], softmax._block

    def counted(*args: Any):
        assert not any(logits() is not None for logits in alive), "those of the block before are there no more"
        found = block(*args)
        sizes.append(found[1].numel())
        alive.append(weakref.ref(found[1]))
        return found

    monkeypatch.setattr(softmax, "_block", counted)
    rows, columns, positive, *_ = _inputs()
    softmax_loss(rows, columns, positive, temperature=1.0, max_logits=allowed).sum().backward()
    assert max(sizes) == largest
    assert sum(sizes) == computed, "forward, and backward where not all of them could be kept"


def _gathered(rank: int, world_size: int) -> list[torch.Tensor]:
    """Each rank weighs the rows of all ranks by its own numbers; the loss is the mean over ranks."""
    rows = _whole().chunk(world_size)[rank].clone().requires_grad_()
    mine = torch.randn(12, 3, generator=torch.Generator().manual_seed(rank))
    everyone = gather(rows)
    assert torch.equal(everyone, _whole())
    assert torch.equal(gather(torch.tensor([rank])), torch.arange(world_size))
    (everyone.sin() * mine).sum().backward()
    return [rows.grad, mine]


def _whole() -> torch.Tensor:
    return torch.randn(12, 3, generator=torch.Generator().manual_seed(99))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_gathered_row_gets_the_gradients_of_all_ranks(world_size):
    results = run_ranks(_gathered, world_size)
    expected = _whole().cos() * sum(mine for _, mine in results)
    torch.testing.assert_close(torch.cat([gradient for gradient, _ in results]), expected)
