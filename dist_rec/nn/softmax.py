"""The softmax of each row over many columns, of which one is its positive, in bounded memory.

Letters: B rows, C columns, V width of a vector.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MAX_LOGITS = 2**24
"""Logits that are held at a time, 64 MiB of float32."""


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

    Logits are computed a few rows at a time, in backward again: of any number of columns no more than `max_logits` (and
    no less than one row) are in memory, and the result does not depend on it beyond rounding.

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
        losses, norms = rows.new_empty(len(rows)), rows.new_empty(len(rows))
        ctx.temperature, ctx.max_logits = temperature, max_logits
        saved = (rows, columns, positive, bias, row_ids, column_ids)
        for here, logits in _blocks(*saved, temperature, max_logits):
            norms[here] = logits.logsumexp(dim=1)
            losses[here] = norms[here] - logits.gather(1, positive[here, None]).squeeze(1)
        # of a row that no column counts for, all logits are -inf: their shares are 0, not nan
        ctx.save_for_backward(*saved, norms.masked_fill(norms.isneginf(), 0))
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns, positive, bias, row_ids, column_ids, norms = ctx.saved_tensors
        saved = (rows, columns, positive, bias, row_ids, column_ids)
        of_rows, of_columns = torch.empty_like(rows), torch.zeros_like(columns)
        for here, logits in _blocks(*saved, ctx.temperature, ctx.max_logits):
            share = logits.sub_(norms[here, None]).exp_()
            share.scatter_add_(1, positive[here, None], -torch.ones_like(share[:, :1]))
            share *= gradient[here, None] / ctx.temperature
            of_rows[here] = share @ columns
            of_columns.addmm_(share.T, rows[here])
        return of_rows, of_columns, None, None, None, None, None, None


def _blocks(
    rows: Tensor,
    columns: Tensor,
    positive: Tensor,
    bias: Tensor,
    row_ids: Tensor,
    column_ids: Tensor,
    temperature: float,
    max_logits: int,
) -> Iterator[tuple[slice, Tensor]]:
    """The logits, a few rows at a time."""
    step = max(1, max_logits // max(len(columns), 1))
    for start in range(0, len(rows), step):
        here = slice(start, start + step)
        logits = (rows[here] @ columns.T).div_(temperature).add_(bias)
        if len(column_ids):
            same = row_ids[here, None] == column_ids
            same.scatter_(1, positive[here, None], False)
            logits.masked_fill_(same, -torch.inf)
        yield here, logits
