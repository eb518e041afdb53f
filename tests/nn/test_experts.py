"""Experts, the mixtures of gates (property 6 of Crocodile's list), gate units and extraction levels."""

from __future__ import annotations

import pytest
import torch

from dist_rec.nn.domains import Domains
from dist_rec.nn.experts import DomainMixture, Experts, GateUnit, mix
from dist_rec.nn.extraction import Extraction, InnerExtraction

B, M, D, N, S = 7, 3, 4, 5, 3
DOMAIN = torch.tensor([0, 2, 1, 0, 2, 2, 0])


def test_experts_read_their_own_input() -> None:
    torch.manual_seed(0)
    bank = Experts(M, N, [6, D])
    inputs = torch.randn(M, B, N)
    found = bank(inputs)
    assert found.shape == (B, M, D) and bank.out_width == D
    for m in range(M):
        torch.testing.assert_close(found[:, m], bank.experts[m](inputs[m]))
    with pytest.raises(ValueError):
        bank(inputs[:2])


def test_gates_are_a_softmax_over_experts() -> None:
    torch.manual_seed(0)
    experts, logits = torch.randn(B, M, D), torch.randn(B, M, D)
    found = mix(experts, logits)
    for b in range(B):
        for d in range(D):
            weights = torch.softmax(logits[b, :, d], 0)
            assert weights.sum().item() == pytest.approx(1)
            assert found[b, d].item() == pytest.approx((weights * experts[b, :, d]).sum().item(), abs=1e-6)
    torch.testing.assert_close(mix(torch.ones(B, M, D), logits), torch.ones(B, D))
    # equal logits: the mean of the experts
    torch.testing.assert_close(mix(experts, torch.full((B, M, D), 3.0)), experts.mean(1))
    # a gate that is the same in every column is MMoE's
    scalar = torch.randn(B, M)
    torch.testing.assert_close(mix(experts, scalar.unsqueeze(2).expand(B, M, D)), mix(experts, scalar))


@pytest.mark.parametrize("elementwise", [True, False])
def test_a_domain_mixture_is_gates_experts_towers(elementwise: bool) -> None:
    torch.manual_seed(0)
    mixture = DomainMixture(
        num_domains=S, in_width=N, gate_width=2, num_experts=M, experts=[D], elementwise=elementwise, towers=[6],
        num_labels=2, dropout=0.0,
    )  # fmt: skip
    inputs, r, domains = torch.randn(M, B, N), torch.randn(B, 2), Domains(DOMAIN, S)
    logits, representations = mixture(inputs, r, domains)
    experts = torch.stack([torch.relu(inputs[m] @ e.layers[0].weight.T + e.layers[0].bias) for m, e in
                           enumerate(mixture.experts.experts)], 1)  # fmt: skip
    shared = []
    for b, s in enumerate(DOMAIN):
        gate = mixture.gates.weight[s] @ r[b] + mixture.gates.bias[s]
        gate = gate.view(M, D) if elementwise else gate.view(M, 1)
        shared.append((torch.softmax(gate, 0) * experts[b]).sum(0))
    torch.testing.assert_close(representations["shared"], torch.stack(shared))
    torch.testing.assert_close(logits, mixture.towers(torch.stack(shared), domains))
    for m in range(M):
        torch.testing.assert_close(representations[f"expert_{m}"], experts[:, m])
    assert mixture.representation_dims == {n: r.shape[1] for n, r in representations.items()}


def test_gate_units_lie_between_0_and_2_and_start_near_1() -> None:
    torch.manual_seed(0)
    unit = GateUnit(N, 8, 6)
    x = torch.randn(100, N)
    w1, b1, w2, b2 = unit.parameters()
    torch.testing.assert_close(unit(x), 2 / (1 + torch.exp(-(torch.relu(x @ w1.T + b1) @ w2.T + b2))))
    assert unit(x).mean().item() == pytest.approx(1, abs=0.2)
    assert 0 <= unit(1e4 * x).min() < 0.01 and 1.99 < unit(1e4 * x).max() <= 2


def test_the_last_level_mixes_own_and_shared_experts() -> None:
    torch.manual_seed(0)
    level = Extraction(S, N, [D], own=2, shared=3, dropout=0.0)
    own, shared, domains = torch.randn(B, N), torch.randn(3, B, N), Domains(DOMAIN, S)
    found = level(own, list(shared), domains)
    for b, s in enumerate(DOMAIN):
        mine = [torch.relu(e.layers[0].weight[s] @ own[b] + e.layers[0].bias[s]) for e in level.own]
        common = [level.shared.experts[m](shared[m, b]) for m in range(3)]
        gate = torch.softmax(level.gates.weight[s] @ own[b] + level.gates.bias[s], 0)
        torch.testing.assert_close(found[b], (gate[:, None] * torch.stack([*mine, *common])).sum(0))


def test_an_inner_level_goes_on_for_all_domains_and_its_shared_part_sees_all_experts() -> None:
    torch.manual_seed(0)
    level = InnerExtraction(S, N, [D], own=2, shared=1, dropout=0.0)
    own, shared = torch.randn(S, B, N), torch.randn(B, N)
    every, common = level.every(own, shared)
    assert every.shape == (S, B, D) and common.shape == (B, D)
    for s in range(S):
        # for its own domain, an inner level is the last level
        here = Domains(torch.full((B,), s), S)
        torch.testing.assert_close(every[s], level(own[s], [shared], here))
    experts = [expert.every(own)[s] for s in range(S) for expert in level.own] + [level.shared.experts[0](shared)]
    gate = torch.softmax(level.shared_gate(shared), 1)
    torch.testing.assert_close(common, (gate[:, :, None] * torch.stack(experts, 1)).sum(1))
