"""The covariance loss of Crocodile (arXiv 2405.12706) alone: its formula, its properties, its errors.

How it trains, on one rank and on several, is tested in tests/methods/test_crocodile.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.auxiliary import covariance
from dist_rec.contract import ArchOutput
from dist_rec.data.batch import Batch
from dist_rec.recommender import build
from dist_rec.settings import ConfigError
from tests.domains import global_rows, settings


def loss_of(experts: Tensor, weights: Tensor | None = None, **options: Any) -> Tensor:
    """The covariance loss with alpha 1 of (M, N, d) outputs."""
    names = {f"expert_{m}": expert for m, expert in enumerate(experts)}
    dims = {name: expert.shape[1] for name, expert in names.items()}
    rows = experts.shape[1]
    weights = torch.ones(rows) if weights is None else weights
    sparse = KeyedJaggedTensor.from_lengths_sync(["s"], torch.zeros(0).long(), torch.zeros(rows).long())
    batch = Batch(dense=torch.zeros(rows, 0), sparse=sparse, labels=torch.zeros(rows, 1), weights=weights)
    module = covariance.Config(**{"alpha": 1.0, **options}).build(None, dims)  # type: ignore[arg-type]
    return module(ArchOutput(torch.zeros(rows, 1), names), batch, _no_view)["covariance"]


def _no_view(view: str) -> Tensor:
    raise AssertionError(f"asked for view {view}")


def by_hand(experts: Tensor, normalize: bool = True, include_self: bool = False) -> float:
    """The formula in double precision, from the sums of products: sum o o^T - N mean mean^T (property 5)."""
    o = experts.double()
    number, d = o.shape[1], o.shape[2]
    result = 0.0
    for p in range(len(o)):
        for q in range(p + 1 if include_self else p):
            c = torch.einsum("ni,nj->ij", o[p], o[q]) - number * torch.outer(o[p].mean(0), o[q].mean(0))
            centred = (o[p] - o[p].mean(0)).T @ (o[q] - o[q].mean(0))
            torch.testing.assert_close(c, centred, atol=1e-9, rtol=0)
            result += float(c.abs().sum()) / d**2
    return result / (number - 1) if normalize else result


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("include_self", [True, False])
def test_it_equals_the_formula(normalize: bool, include_self: bool) -> None:
    torch.manual_seed(0)
    experts = torch.randn(4, 50, 3) + torch.randn(3)
    found = loss_of(experts, normalize=normalize, include_self=include_self)
    assert found.item() == pytest.approx(by_hand(experts, normalize, include_self), rel=1e-5)
    # two experts of one column, four rows: deviations -1 1 -1 1 and 0 2 -2 0, their products 0 2 2 0
    tiny = torch.tensor([[[1.0], [3.0], [1.0], [3.0]], [[5.0], [7.0], [3.0], [5.0]]])
    assert loss_of(tiny).item() == pytest.approx(4 / 3)
    assert loss_of(tiny, normalize=False).item() == pytest.approx(4)
    assert loss_of(tiny, normalize=False, include_self=True).item() == pytest.approx(4 + 4 + 8)


def test_independent_and_identical_experts() -> None:
    """Properties 1 and 2: independent experts are near 0 only in the normalised form."""
    torch.manual_seed(0)
    number, d = 4096, 16
    independent = torch.randn(2, number, d)
    expected = math.sqrt(2 / (math.pi * number))
    assert loss_of(independent).item() == pytest.approx(expected, rel=0.1)
    literal = math.sqrt(2 * number / math.pi)
    assert loss_of(independent, normalize=False).item() == pytest.approx(literal, rel=0.1)
    same = independent[:1].expand(2, -1, -1)
    wanted = number / d + (1 - 1 / d) * literal
    assert loss_of(same, normalize=False).item() == pytest.approx(wanted, rel=0.05)
    assert loss_of(same).item() > 5 * loss_of(independent).item()


def test_shifts_scales_and_orders() -> None:
    """Properties 3 and 4."""
    torch.manual_seed(0)
    experts = torch.randn(3, 200, 4)
    value = loss_of(experts).item()
    assert loss_of(experts + 100 * torch.randn(3, 1, 4)).item() == pytest.approx(value, rel=1e-4)
    assert loss_of(experts[:, torch.randperm(200)]).item() == pytest.approx(value, rel=1e-5)
    assert loss_of(experts[[2, 0, 1]]).item() == pytest.approx(value, rel=1e-5)
    # scaling one expert scales its own pairs
    pair = loss_of(experts[:2]).item()
    assert loss_of(torch.stack([-3 * experts[0], experts[1]])).item() == pytest.approx(3 * pair, rel=1e-5)


def test_one_expert_costs_nothing_unless_asked() -> None:
    experts = torch.randn(1, 20, 4)
    assert loss_of(experts).item() == 0
    assert loss_of(experts, include_self=True).item() == pytest.approx(by_hand(experts, include_self=True), rel=1e-5)


def test_padding_is_not_there_whatever_it_holds() -> None:
    torch.manual_seed(0)
    experts = torch.randn(3, 30, 4)
    weights = torch.rand(30) + 0.5
    weights[20:] = 0
    for filler in (0.0, 1e9, math.nan, math.inf):
        padded = experts.clone()
        padded[:, 20:] = filler
        padded.requires_grad_()
        loss = loss_of(padded, weights)
        assert loss.item() == pytest.approx(by_hand(experts[:, :20]), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, padded)
        assert torch.isfinite(gradient).all() and (gradient[:, 20:] == 0).all()
    assert loss_of(experts, torch.zeros(30)).item() == 0
    assert loss_of(experts, torch.tensor([1.0] + [0.0] * 29)).item() == 0


def test_float32_under_autocast_and_from_narrow_outputs() -> None:
    torch.manual_seed(0)
    experts = torch.randn(2, 500, 8) + 30
    exact = loss_of(experts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss_of(experts), exact)
        narrow = loss_of(experts.bfloat16())
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(by_hand(experts.bfloat16().float()), rel=1e-5)


def test_gradient_by_finite_differences() -> None:
    torch.manual_seed(0)
    experts = torch.randn(3, 12, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss_of(experts), experts)
    direction, step = torch.randn_like(experts), 1e-6
    with torch.no_grad():
        ahead, behind = (by_hand(experts.double() + s * direction.double()) for s in (step, -step))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


def test_evaluation_computes_no_loss_terms() -> None:
    model, _ = build(settings(alpha=0.1), table_device="cpu")
    batch = global_rows(settings().schema, 0)
    assert set(model.train()(batch)[1].losses) == {"bce", "covariance"}
    assert not model.eval()(batch)[1].losses


def test_bad_settings_and_models_without_experts_are_named() -> None:
    schema = settings().schema
    found = {c.key: c.text for c in covariance.Config(alpha=-1, rows=1).check(schema)}
    assert "is -1" in found["alpha"] and "at least 2 rows" in found["rows"]
    with pytest.raises(
        ConfigError, match=r"auxiliary.covariance: needs representations expert_0.*it has: shared \(8\)"
    ):
        build(settings("shared_bottom", alpha=0.1))
    with pytest.raises(ConfigError, match="of one width"):
        covariance.Config().build(schema, {"expert_0": 3, "expert_1": 4})
