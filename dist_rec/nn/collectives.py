"""Sums over all ranks in the middle of a loss or a model. Letters: W ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    """W; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(x: Tensor) -> Tensor:
    """The sum of `x` over all ranks, without a gradient. Collective."""
    x = x.detach().clone()
    if num_ranks() > 1:
        dist.all_reduce(x)
    return x


def sum_over_ranks(x: Tensor, *, alike: bool = False) -> Tensor:
    """The sum of `x` over all ranks, with the gradient of the sum of all ranks' losses. Collective.

    As every rank's loss depends on every rank's `x`, the gradient is the sum of what arrives on all ranks; the mean
    that data parallelism takes then makes it that of the mean of the losses. The same shape is needed on all ranks.

    Args:
        alike: promises that everything after this is computed from the same numbers on every rank, as the sum's own
            norm would be. The gradients that arrive are then equal, and W times one of them is their sum: nothing has
            to be exchanged for it.
    """
    if num_ranks() == 1:
        return x
    return _Sum.apply(x, alike)


class _Sum(torch.autograd.Function):
    # torch.distributed.nn.functional.all_reduce is deprecated, and its successor has no gradient in torch 2.11
    @staticmethod
    def forward(ctx: Any, x: Tensor, alike: bool) -> Tensor:
        ctx.alike = alike
        return total(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * num_ranks() if ctx.alike else total(grads[0]), None
