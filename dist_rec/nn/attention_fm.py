"""Attention-FM: the Gram matrix of the features times an attention that an MLP reads off them.

Letters: B rows, M features, D width, K columns of the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dist_rec.nn.mlp import MLP

Gram = Literal["features", "dimensions"]


def gram_product(x: Tensor, y: Tensor) -> Tensor:
    """``G = (X X^T) Y`` for every row, computed as ``X (X^T Y)``: 2 N C K multiplications in place of N^2 (C + K).

    So ``dL/dY = X X^T dL/dG`` (the Gram matrix is symmetric), the form in which C2AL argues about gradients.

    Args:
        x: (B, N, C). y: (B, N, K).
    Returns: (B, N, K).
    Source: C2AL, arXiv 2510.02215, figure 1 and equation 1.
    """
    return torch.bmm(x, torch.bmm(x.mT, y))


class AttentionFM(nn.Module):
    """``post_attention(G)`` with ``G = X X^T Y`` and ``Y = attention(vec X)``.

    - gram "features": X is (M, D), features by dimensions, Y and G are (M, K). The Gram matrix holds the products of
      all pairs of features, as in an FM, compressed from M to K columns.
    - gram "dimensions": X is (D, M), the shapes that C2AL's equation 1 states, Y and G are (D, K). The Gram matrix is
      then one over embedding dimensions.

    post_attention maps each row of G to the width of the result: K to D, or K to M. Since
    ``(X X^T Y) W = X ((X^T Y) W)`` it is a layer on the post-attention embedding X^T Y.

    Source: C2AL, arXiv 2510.02215, figure 1 and equation 1; sizes and the layer behind G are ours, the paper has none.

    Attributes:
        attention: the MLP from vec X to Y; its parameters are the paper's attention weights, its result the
            activation Y, (B, M, K) or (B, D, K).
        post_attention: linear, no bias; its argument is G.

    Example::

        AttentionFM(27, 16, columns=8, hidden=[64])(torch.randn(4, 27, 16)).shape  # (4, 27, 16)
    """

    def __init__(
        self, num_features: int, dim: int, *, columns: int, hidden: Sequence[int] = (), gram: Gram = "features"
    ) -> None:
        """Args:
        num_features: M. dim: D. columns: K.
        hidden: widths of the attention MLP before its last, linear layer of M * K or D * K columns.
        gram: which Gram matrix, see above.
        """
        super().__init__()
        self.gram = gram
        rows, across = (num_features, dim) if gram == "features" else (dim, num_features)
        hidden_layers = MLP(num_features * dim, hidden)
        self.attention = nn.Sequential(
            hidden_layers, nn.Linear(hidden_layers.out_width, rows * columns), nn.Unflatten(1, (rows, columns))
        )
        self.post_attention = nn.Linear(columns, across, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, M, D). Returns (B, M, D)."""
        y = self.attention(x.flatten(1))
        if self.gram == "features":
            return self.post_attention(gram_product(x, y))
        return self.post_attention(gram_product(x.mT, y)).mT
