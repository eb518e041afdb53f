"""Rows of all ranks beside each other, with the gradient of every rank that used them.

Letters: W ranks, B rows of each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """W; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(rows: Tensor) -> Tensor:
    """(W * B, ...) the (B, ...) rows of all ranks in their order. Collective, and in backward again.

    A row's gradient is the sum of what all ranks found. If each rank's loss is its share of a mean over ranks, that
    is the gradient that data parallelism then averages. A gather without it would keep only the part of the row's own
    rank.
    """
    if ranks() == 1:
        return rows
    return _Gather.apply(rows) if rows.requires_grad else _gathered(rows)


def _gathered(rows: Tensor) -> Tensor:
    result = rows.new_empty((ranks() * len(rows), *rows.shape[1:]))
    dist.all_gather_into_tensor(result, rows.contiguous())
    return result


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _gathered(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty((len(gradient) // ranks(), *gradient.shape[1:]))
        dist.reduce_scatter_tensor(own, gradient.contiguous())
        return own
