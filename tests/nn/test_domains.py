"""Parameters per domain: what each row gets, on both roads, and what it gives back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_rec.nn.domains import DomainLinear, DomainMLP, Domains, Towers

S, B, N, H = 4, 11, 5, 3
DOMAIN = torch.tensor([2, 0, 2, -1, 3, 0, 0, 2, -1, 3, 2])  # nobody is in domain 1, two rows are padding


def layer() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return (x.requires_grad_() for x in (torch.randn(B, N), torch.randn(S, H, N), torch.randn(S, H)))  # type: ignore[return-value]


def by_hand(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    rows = [weight[max(int(s), 0)] @ row + bias[max(int(s), 0)] for row, s in zip(x, DOMAIN, strict=True)]
    return torch.stack(rows)


@pytest.mark.parametrize("road", ["_by_sorting", "_by_picking", "linear"])
def test_every_row_goes_through_its_own_domains_layer(road: str) -> None:
    x, weight, bias = layer()
    found = getattr(Domains(DOMAIN, S), road)(x, weight, bias)
    wanted = by_hand(x, weight, bias)
    torch.testing.assert_close(found, wanted)
    upstream = torch.randn(B, H)
    mine, theirs = (torch.autograd.grad(y, (x, weight, bias), upstream) for y in (found, wanted))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert (mine[1][1] == 0).all() and (mine[2][1] == 0).all()
    assert (mine[1][[0, 2, 3]] != 0).all()


def test_pick_and_one_hot() -> None:
    values = torch.randn(B, S, H)
    domains = Domains(DOMAIN, S)
    torch.testing.assert_close(domains.pick(values), values[torch.arange(B), DOMAIN.clamp(min=0)])
    real = DOMAIN >= 0
    one_hot = domains.one_hot()
    assert torch.equal(one_hot[real], nn.functional.one_hot(DOMAIN[real], S).float())
    assert (one_hot[~real] == 0).all()


def test_a_domain_that_does_not_exist_is_an_error() -> None:
    x, weight, bias = layer()
    with pytest.raises(IndexError, match=r"domain 4 is outside 0..3"):
        Domains(DOMAIN + 1, S).linear(x, weight, bias)
    with pytest.raises(RuntimeError):
        Domains(DOMAIN + 1, S)._by_picking(x, weight, bias)


def test_layers_are_initialised_as_linear_ones_and_differ() -> None:
    torch.manual_seed(0)
    layers = DomainLinear(50, 64, 32)
    plain = nn.Linear(64, 32)
    for mine, theirs in ((layers.weight, plain.weight), (layers.bias, plain.bias)):
        assert mine.abs().max() <= 1 / 8
        assert mine.std().item() == pytest.approx(theirs.std().item(), rel=0.1)
    assert not torch.equal(layers.weight[0], layers.weight[1])


def test_an_mlp_per_domain_and_every_domains_on_its_own_input() -> None:
    torch.manual_seed(0)
    mlp = DomainMLP(S, N, [7, H])
    x = torch.randn(B, N)
    each = []
    for s in range(S):
        h = x
        for one in mlp.layers:
            h = torch.relu(h @ one.weight[s].T + one.bias[s])
        each.append(h)
    picked = torch.stack([each[max(int(s), 0)][b] for b, s in enumerate(DOMAIN)])
    torch.testing.assert_close(mlp(x, Domains(DOMAIN, S)), picked)
    inputs = torch.randn(S, B, N)
    every = mlp.every(inputs)
    for s in range(S):
        torch.testing.assert_close(every[s], mlp(inputs[s], Domains(torch.full((B,), s), S)))
    assert mlp.out_width == H and DomainMLP(S, N, []).out_width == N


def test_towers_end_in_logits_and_drop_in_training_only() -> None:
    torch.manual_seed(0)
    domains, x = Domains(DOMAIN, S), torch.randn(B, N)
    towers = Towers(S, N, [6], 2, dropout=0.5)
    assert towers(x, domains).shape == (B, 2)
    assert not torch.equal(towers(x, domains), towers(x, domains))
    towers.eval()
    torch.testing.assert_close(towers(x, domains), towers.head(towers.deep(x, domains), domains))
    none = Towers(S, N, [], 2)
    torch.testing.assert_close(none(x, domains), none.head(x, domains))
