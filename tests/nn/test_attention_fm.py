"""Attention-FM against the literal Gram matrix, and the gradient that C2AL's argument rests on (papers: 1d.4, 1d.5)."""

from __future__ import annotations

import pytest
import torch

from dist_rec.nn.attention_fm import AttentionFM, gram_product

B, M, D, K = 5, 6, 4, 3


def test_the_order_of_the_products_does_not_matter() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(B, M, D), torch.randn(B, M, K)
    literal = (x @ x.transpose(1, 2)) @ y
    assert (gram_product(x, y) - literal).norm() / literal.norm() < 1e-5


def test_gradient_of_y_is_the_gram_matrix_times_the_gradient_of_g() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(B, M, D, dtype=torch.float64), torch.randn(B, M, K, dtype=torch.float64, requires_grad=True)
    g = gram_product(x, y)
    (grad_g,) = torch.autograd.grad(g.sin().sum(), g, retain_graph=True)
    (grad_y,) = torch.autograd.grad(g.sin().sum(), y)
    torch.testing.assert_close(grad_y, x @ x.mT @ grad_g, rtol=1e-12, atol=1e-12)
    step = torch.randn_like(y)
    change = gram_product(x, y + step) - g
    torch.testing.assert_close(change, x @ x.mT @ step, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gram", ["features", "dimensions"])
def test_module_equals_the_formula_row_by_row(gram: str) -> None:
    torch.manual_seed(2)
    module = AttentionFM(M, D, columns=K, hidden=[7], gram=gram)
    x = torch.randn(B, M, D)
    found = module(x)
    w1, b1, w2, b2 = module.attention.parameters()
    for row in range(B):
        xs = x[row] if gram == "features" else x[row].T  # (M, D), or the paper's (D, M)
        y = (torch.relu(x[row].flatten() @ w1.T + b1) @ w2.T + b2).view(len(xs), K)
        g = xs @ xs.T @ y
        expected = g @ module.post_attention.weight.T
        torch.testing.assert_close(found[row], expected if gram == "features" else expected.T)
        # the layer behind G acts on the post-attention embedding X^T Y
        torch.testing.assert_close(expected, xs @ ((xs.T @ y) @ module.post_attention.weight.T))


@pytest.mark.parametrize("gram", ["features", "dimensions"])
def test_a_row_sees_no_other_row(gram: str) -> None:
    torch.manual_seed(3)
    module = AttentionFM(M, D, columns=K, gram=gram)
    x = torch.randn(B, M, D, requires_grad=True)
    module(x)[2].sum().backward()
    assert x.grad is not None
    assert x.grad[2].abs().sum() > 0
    assert x.grad[[0, 1, 3, 4]].abs().sum() == 0
