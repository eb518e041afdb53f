"""Dot interaction against the plain formula, its gradients, autocast and export."""

from __future__ import annotations

import pytest
import torch

from dist_rec.nn.interaction import DotInteraction


def plain(x: torch.Tensor) -> torch.Tensor:
    """Every pair's dot product, pair by pair."""
    f = x.shape[1]
    return torch.stack([(x[:, i] * x[:, j]).sum(1) for i in range(f) for j in range(i + 1, f)], dim=1)


def test_pairs_in_documented_order() -> None:
    x = torch.tensor([[[1.0, 0.0], [2.0, 1.0], [0.0, 5.0]]])
    assert DotInteraction(3)(x).tolist() == [[2.0, 0.0, 5.0]]
    assert DotInteraction(3).out_width == 3


@pytest.mark.parametrize(("f", "d"), [(2, 1), (5, 4), (27, 16)])
def test_value_and_gradient_equal_the_plain_formula(f: int, d: int) -> None:
    torch.manual_seed(f)
    x = torch.randn(6, f, d, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, f * (f - 1) // 2, dtype=torch.float64)
    results = []
    for function in (DotInteraction(f), plain):
        out = function(x)
        results.append((out.detach(), *torch.autograd.grad((out * weights).sum(), x)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def test_gradcheck_first_and_second_order() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(DotInteraction(4), x)
    assert torch.autograd.gradgradcheck(DotInteraction(4), x)


def test_autocast_computes_in_bfloat16_and_returns_a_float32_gradient() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 5, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = DotInteraction(5)(x)
        assert out.dtype == torch.bfloat16
        assert DotInteraction(5)(x.double()).dtype == torch.float64
    (grad,) = torch.autograd.grad(out.float().square().sum(), x)
    (exact,) = torch.autograd.grad(plain(x).square().sum(), x)
    assert grad.dtype == torch.float32
    assert 0 < (grad - exact).norm() / exact.norm() < 0.02


def test_backward_under_autocast_keeps_float32() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 5, 16, requires_grad=True)
    out = DotInteraction(5)(x).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(plain(x).sum(), x)[0])


def test_buffers_stay_out_of_checkpoints() -> None:
    assert DotInteraction(4).state_dict() == {}


def test_exports() -> None:
    x = torch.randn(3, 4, 2)
    program = torch.export.export(DotInteraction(4), (x,))
    torch.testing.assert_close(program.module()(x), plain(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_with_and_without_autocast() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 27, 16, requires_grad=True)
    (exact,) = torch.autograd.grad(plain(x).square().sum(), x)
    on_gpu = x.detach().cuda().requires_grad_()
    module = DotInteraction(27).cuda()
    (grad,) = torch.autograd.grad(module(on_gpu).square().sum(), on_gpu)
    torch.testing.assert_close(grad.cpu(), exact, rtol=1e-4, atol=1e-3)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = module(on_gpu)
    assert out.dtype == torch.bfloat16
    (narrow,) = torch.autograd.grad(out.float().square().sum(), on_gpu)
    assert narrow.dtype == torch.float32
    assert (narrow.cpu() - exact).norm() / exact.norm() < 0.02
