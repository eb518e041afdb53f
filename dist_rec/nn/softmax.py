"""The softmax of each row over many columns, of which one is its positive, in bounded memory.

Letters: B rows, C columns, V width of a vector.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LOGITS = 2**24
"""Logits that a loss holds at a time, 64 MiB of float32 and 16 of marks; those of a single block until backward."""


def softmax_loss(
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    *,
    temperature: float,
    bias: Tensor | None = None,
    row_ids: Tensor | None = None,
    column_ids: Tensor | None = None,
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """(B,) -log(exp(l_ip) / sum_j exp(l_ij)) with l_ij = <row i, column j> / temperature + bias_j and p = positive_i.

    Logits are computed a few rows at a time, and again in backward where there is more than one such block: of any
    number of columns no more than `max_logits` (and no less than one row) are in memory, and the result does not depend
    on it beyond rounding.

    Args:
        rows: (B, V). columns: (C, V). Give float32: with a temperature of 0.06 bfloat16 is too coarse.
        positive: (B,) int64. bias: (C,) constant, -inf leaves a column out.
        row_ids, column_ids: (B,) and (C,) int64. A column with the id of the row counts only if it is the positive.
    """
    bias = rows.new_zeros(len(columns)) if bias is None else bias
    if row_ids is None or column_ids is None:
        row_ids = column_ids = positive.new_empty(0)
    return _SoftmaxLoss.apply(rows, columns, positive, bias, row_ids, column_ids, temperature, max_logits)


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        positive: Tensor,
        bias: Tensor,
        row_ids: Tensor,
        column_ids: Tensor,
        temperature: float,
        max_logits: int,
    ) -> Tensor:
        losses = rows.new_empty(len(rows))
        ctx.temperature, ctx.max_logits = temperature, max_logits
        saved = (rows, columns, positive, bias, row_ids, column_ids)
        blocks = _blocks(len(rows), len(columns), max_logits)
        for here in blocks:
            losses[here], *kept = _block(here, *saved, temperature)
            if len(blocks) > 1:
                kept = []  # before the next block takes as much
        ctx.save_for_backward(*saved, *kept)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, positive, bias, row_ids, column_ids, *kept = ctx.saved_tensors
        saved = (rows, columns, positive, bias, row_ids, column_ids)
        # as (V, b) @ (b, C): of 1024 x 1024 x 64, MKL takes a third more for (C, b) @ (b, V)
        of_rows, of_columns = torch.empty_like(rows), columns.new_zeros(columns.shape[1], len(columns))
        for here in _blocks(len(rows), len(columns), ctx.max_logits):
            slopes, totals = kept or _block(here, *saved, ctx.temperature)[1:]
            scale = (gradient[here] / ctx.temperature / totals)[:, None]
            of_rows[here] = (slopes @ columns).mul_(scale)
            of_columns.addmm_((rows[here] * scale).T, slopes)
            del slopes, totals  # before the next block takes as much
        return of_rows, of_columns.T, None, None, None, None, None, None


def _blocks(num_rows: int, num_columns: int, max_logits: int) -> list[slice]:
    """The rows whose logits are in memory at a time."""
    step = max(1, max_logits // max(num_columns, 1))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _block(
    here: slice,
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    bias: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows: (b,) losses; (b, C) the losses' derivatives by the logits, times totals; (b,) totals."""
    place = positive[here, None]
    logits = torch.addmm(bias, rows[here] / temperature, columns.T)  # as few passes over b x C numbers as there can be
    if len(column_ids):
        same = row_ids[here, None] == column_ids
        same.scatter_(1, place, False)
        logits.masked_fill_(same, -torch.inf)
    top = logits.amax(dim=1, keepdim=True)
    # of a row that no column counts for, all logits are -inf: their shares are 0, not nan
    logits -= top.masked_fill(top.isneginf(), 0)
    of_positive = logits.gather(1, place)
    totals = logits.exp_().sum(dim=1, keepdim=True)
    losses = totals.log() - of_positive
    totals.masked_fill_(totals == 0, 1)
    logits.scatter_add_(1, place, -totals)
    return losses.squeeze(1), logits, totals.squeeze(1)
