"""Losses of single rows, before anybody weighs or adds them up. Letters: B rows of this rank, T labels."""

from __future__ import annotations

from torch import Tensor, nn


def bce_of_rows(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """(B,) float32: ``w_b * sum_t bce(z_bt, y_bt)`` in nats.

    logits, labels: (B, T). weights: (B,), 0 for padding rows.
    """
    loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels, reduction="none")
    return loss.sum(dim=1) * weights
