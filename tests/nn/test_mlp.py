"""MLP: what it computes, and what its complaints say."""

from __future__ import annotations

import pytest
import torch

from dist_rec.nn.mlp import MLP, dropout_problem, widths_problem


def test_every_layer_is_linear_then_activation() -> None:
    torch.manual_seed(0)
    mlp = MLP(5, [4, 3])
    x = torch.randn(7, 5)
    w1, b1, w2, b2 = mlp.parameters()
    expected = (torch.relu(x @ w1.T + b1) @ w2.T + b2).clamp(min=0)
    torch.testing.assert_close(mlp(x), expected)
    assert mlp.out_width == 3


@pytest.mark.parametrize(("name", "function"), [("tanh", torch.tanh), ("silu", torch.nn.functional.silu)])
def test_activation_is_chosen_by_name(name: str, function: object) -> None:
    mlp = MLP(5, [4], activation=name)  # type: ignore[arg-type]
    x = torch.randn(7, 5)
    weight, bias = mlp.parameters()
    torch.testing.assert_close(mlp(x), function(x @ weight.T + bias))  # type: ignore[operator]


def test_no_widths_is_the_identity() -> None:
    x = torch.randn(2, 5)
    mlp = MLP(5, [])
    assert mlp(x) is x
    assert mlp.out_width == 5


def test_dropout_drops_in_training_only() -> None:
    torch.manual_seed(0)
    mlp = MLP(5, [1000], activation="tanh", dropout=0.5)
    x = torch.randn(1, 5)
    dropped = (mlp(x) == 0).float().mean().item()
    assert 0.4 < dropped < 0.6
    mlp.eval()
    assert (mlp(x) != 0).all()


def test_same_seed_same_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in MLP(5, [4, 3]).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_problems_name_the_value_and_the_rule() -> None:
    assert widths_problem([4, 3]) is None
    assert widths_problem([]) is None
    assert "is empty" in (widths_problem([], needed=True) or "")
    assert widths_problem([4, 0]) == "is [4, 0]; every layer width must be >= 1, 0 is not"
    assert dropout_problem(0.0) is None
    for bad in (-0.1, 1.0, float("nan")):
        assert str(bad) in (dropout_problem(bad) or "")
