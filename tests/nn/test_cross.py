"""The cross network against the paper's formulas."""

from __future__ import annotations

import pytest
import torch

from dist_rec.nn.cross import cross_network


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("rank", [None, 2])
def test_equals_the_formula(num_layers: int, rank: int | None) -> None:
    torch.manual_seed(0)
    net = cross_network(6, num_layers, rank).double()
    with torch.no_grad():
        for p in net.parameters():
            p.normal_()  # biases too: they start at 0, where a misplaced one would not show
    state = net.state_dict()
    x0 = torch.randn(4, 6, dtype=torch.float64)
    x = x0
    for layer in range(num_layers):
        if rank is None:
            w = state[f"kernels.{layer}"]
        else:
            w = state[f"W_kernels.{layer}"] @ state[f"V_kernels.{layer}"]
        x = x0 * (x @ w.T + state[f"bias.{layer}"].flatten()) + x
    torch.testing.assert_close(net(x0), x)


def test_low_rank_has_fewer_parameters() -> None:
    def count(rank: int | None) -> int:
        return sum(p.numel() for p in cross_network(32, 2, rank).parameters())

    assert count(None) == 2 * (32 * 32 + 32)
    assert count(4) == 2 * (2 * 32 * 4 + 32)
