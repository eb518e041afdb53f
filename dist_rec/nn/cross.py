"""Cross layers of DCN-V2, as TorchRec has them."""

from __future__ import annotations

from torch import nn
from torchrec.modules.crossnet import CrossNet, LowRankCrossNet


def cross_network(width: int, num_layers: int, rank: int | None = None) -> nn.Module:
    """A stack of cross layers, (B, width) -> (B, width).

    Layer l maps ``x_{l+1} = x_0 * (W_l x_l + b_l) + x_l`` with a full W_l, or with ``W_l = U_l V_l^T`` of the given
    rank; * is element-wise. Weights start from Xavier's normal distribution, biases at 0.

    Source: Wang et al. 2021, arXiv 2008.13535, equation 1 (full) and its low-rank form in the section on cost-effective
    low-rank DCN, without the mixture of experts. TorchRec's modules are tested against these formulas, and cost as
    much as `nn.Linear` layers do.

    Args:
        width: N, columns of x_0.
        num_layers: cross layers; the result has products of up to num_layers + 1 columns.
        rank: r, None for a full (N, N) matrix. Saves work below N / 2.
    """
    return CrossNet(width, num_layers) if rank is None else LowRankCrossNet(width, num_layers, low_rank=rank)
