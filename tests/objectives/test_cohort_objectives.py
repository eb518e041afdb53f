"""Objectives that weigh cohorts (re-weighting, GroupDRO, PCGrad): by hand, on several ranks as on one, resumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.contract import ArchOutput
from dist_rec.data.batch import Batch
from dist_rec.data.cohorts import Cohorts
from dist_rec.data.schema import GroupColumn, LabelColumn, Schema, SparseColumn
from dist_rec.nn.gradients import without_conflicts
from dist_rec.objectives import group_dro, pcgrad, reweighted
from dist_rec.training.checkpoint import find
from tests import examples
from tests.examples import COHORTS
from tests.parity import sharded, unsharded, update_errors
from tests.ranks import run_ranks
from tests.runs import merged, reports, train_all, values, write

SCHEMA = Schema(
    labels={"click": LabelColumn(), "buy": LabelColumn()},
    sparse={"s": SparseColumn(num_ids=2)},
    groups={"domain": GroupColumn("domain")},
)
LOGITS = torch.tensor([[math.log(3), 0.0], [0.0, math.log(1 / 4)], [0.0, 0.0], [9.0, 9.0]])
LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
WEIGHTS = torch.tensor([1.0, 2.0, 1.0, 0.0])
DOMAIN = torch.tensor([2, 0, 1, -1])  # head, tail, rest, and a padding row
LOSSES = [math.log(4 / 3) + math.log(2), 2 * (math.log(2) + math.log(5)), 2 * math.log(2)]  # of the rows, weighted


def make_batch(labels: torch.Tensor = LABELS, weights: torch.Tensor = WEIGHTS, domain: torch.Tensor = DOMAIN) -> Batch:
    empty = KeyedJaggedTensor.from_lengths_sync(["s"], torch.zeros(0).long(), torch.zeros(len(labels)).long())
    return Batch(torch.zeros(len(labels), 0), empty, labels, weights, {"domain": domain})


def encode(view: str) -> torch.Tensor:
    raise AssertionError(f"asked for view {view}")


def terms(module: nn.Module, batch: Batch | None = None) -> dict[str, float]:
    found = module(ArchOutput(LOGITS, {}), batch or make_batch(), encode)
    return {name: term.item() for name, term in found.items()}


def test_reweighted_multiplies_the_rows_of_cohorts_and_keeps_the_mean() -> None:
    config = reweighted.Config(cohorts=Cohorts(**COHORTS), head=3.0, tail=0.5, keep_mean=False)
    expected = (3 * LOSSES[0] + 0.5 * LOSSES[1] + LOSSES[2]) / 4
    assert terms(config.build(SCHEMA, {}))["bce"] == pytest.approx(expected, rel=1e-6)
    config.keep_mean = True
    mean = 0.3 * 3 + 0.3 * 0.5 + 0.4
    assert terms(config.build(SCHEMA, {}))["bce"] == pytest.approx(expected / mean, rel=1e-6)
    config.head = config.tail = 1.0
    assert terms(config.build(SCHEMA, {}))["bce"] == pytest.approx(sum(LOSSES) / 4, rel=1e-6)


def test_group_dro_follows_the_losses_of_the_groups_in_training_only() -> None:
    module = group_dro.Config(cohorts=Cohorts(**COHORTS), step_size=0.5).build(SCHEMA, {})
    losses = [LOSSES[0], LOSSES[1] / 2, LOSSES[2]]  # means over the weights of a group's rows
    names = [f"group_dro/{name}" for name in ("head", "tail", "rest")]
    expected = dict(zip(names, [loss / 3 for loss in losses], strict=True))
    assert terms(module.eval()) == pytest.approx(expected, rel=1e-6)
    q = [1 / 3] * 3
    module.train()
    for _ in range(3):
        q = [share * math.exp(0.5 * loss) for share, loss in zip(q, losses, strict=True)]
        q = [share / sum(q) for share in q]
        expected = {name: share * loss for name, share, loss in zip(names, q, losses, strict=True)}
        assert terms(module) == pytest.approx(expected, rel=1e-5)
    assert module.log_weights.exp().tolist() == pytest.approx(q, rel=1e-5)
    assert q[1] == max(q)


def test_group_dro_comes_back_to_a_group_whose_weight_was_too_small_for_a_float() -> None:
    module = group_dro.Config(cohorts=Cohorts(**COHORTS), step_size=100.0).build(SCHEMA, {})
    head_is_hard = torch.tensor([[3.0], [-3.0]])  # logits of a row of the head and one of the tail, both with label 0
    batch = make_batch(torch.zeros(2, 1), torch.ones(2), torch.tensor([2, 0]))
    for logits, hard, easy, steps in ((head_is_hard, "head", "tail", 3), (head_is_hard.flip(0), "tail", "head", 6)):
        for _ in range(steps):
            found = module(ArchOutput(logits, {}), batch, encode)
        assert found[f"group_dro/{hard}"].item() > 1 and found[f"group_dro/{easy}"].item() == 0


def test_group_dro_without_rows_of_a_group() -> None:
    module = group_dro.Config(cohorts=Cohorts(**COHORTS)).build(SCHEMA, {})
    logits = LOGITS.clone().requires_grad_()
    found = module(ArchOutput(logits, {}), make_batch(domain=torch.tensor([1, 0, 1, -1])), encode)
    assert found["group_dro/head"].item() == 0 < found["group_dro/tail"].item()
    torch.stack(list(found.values())).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[3].abs().sum() == 0 < logits.grad[0].abs().sum()


class _Arch(nn.Module):
    """Two layers on given rows, with a "table" in front of them."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = [nn.Parameter(table)]  # not of the arch
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self) -> torch.Tensor:
        return self.layers(self.table[0])


def test_pcgrad_gives_the_arch_the_gradients_without_conflicts_and_the_table_the_plain_one() -> None:
    torch.manual_seed(4)
    arch = _Arch(torch.randn(6, 3))
    y, w, domain = torch.tensor([[1.0], [0], [0], [1], [1], [0]]), torch.ones(6), torch.tensor([2, 2, 0, 0, 1, 1])
    module = pcgrad.Config(cohorts=Cohorts(**COHORTS), seed=7).build(SCHEMA, {})
    module.bind(arch)
    dense, table = list(arch.parameters()), arch.table[0]
    plain = nn.functional.binary_cross_entropy_with_logits(arch(), y)
    (table_grad,) = torch.autograd.grad(plain, [table])
    of_cohorts = []
    for value in (2, 0, 1):
        loss = nn.functional.binary_cross_entropy_with_logits(arch()[domain == value], y[domain == value])
        of_cohorts.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss / 3, dense)]))
    of_cohorts = torch.stack(of_cohorts)
    assert (of_cohorts @ of_cohorts.T < 0).any(), "no conflict to resolve"
    for step in range(3):
        for p in (*dense, table):
            p.grad = None
        (loss,) = module(ArchOutput(arch(), {}), make_batch(y, w, domain), encode).values()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-6)
        loss.backward()
        order = torch.Generator().manual_seed(7 * 2**32 + step)
        expected = without_conflicts(of_cohorts, order)
        found = torch.cat([p.grad.flatten() for p in dense])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert (found - of_cohorts.sum(0)).norm() > 1e-3 * found.norm()
        torch.testing.assert_close(table.grad, table_grad)
    assert module.steps.item() == 3 and not list(module.parameters())
    with torch.no_grad():
        evaluated = module(ArchOutput(arch(), {}), make_batch(y, w, domain), encode)
    assert evaluated["bce"].item() == pytest.approx(plain.item(), rel=1e-6) and module.steps.item() == 3


OBJECTIVES: dict[str, dict[str, Any]] = {
    "reweighted": {"head": 3.0, "tail": 0.5},
    "group_dro": {"step_size": 0.3},
    "pcgrad": {"seed": 1},
}


@pytest.mark.parametrize("world_size", [2, 3])
def test_updates_on_several_ranks_equal_plain_torch(world_size: int) -> None:
    """What an objective remembers is compared too. A fused table that PCGrad's gradients reached would move twice."""
    rates = {"tables": {"name": "sgd", "lr": 1.0}, "dense": {"name": "sgd", "lr": 0.1}}
    groups = {"groups": {"domain": {"column": "domain"}}}
    objectives = [{"name": name, "cohorts": COHORTS, **options} for name, options in OBJECTIVES.items()]
    configs = [examples.config(schema=groups, optim=rates, objective=objective) for objective in objectives]
    for name, config, found in zip(OBJECTIVES, configs, run_ranks(sharded, world_size, configs)[0], strict=True):
        errors = update_errors(found, unsharded(config))
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-4, (
            f"{name} on {world_size} ranks: the update of {worst} is off by {errors[worst]:.1e}"
        )


@pytest.mark.parametrize("name", ["group_dro", "pcgrad"])
def test_what_an_objective_remembers_survives_a_resume(tmp_path: Path, name: str) -> None:
    data = write(tmp_path / "data", 300)
    objective = {"name": name, "cohorts": COHORTS, **OBJECTIVES[name]}
    run = values(data, tmp_path / "whole", objective=objective, train={"steps": 12, "epochs": 9}, report={"every": 1})
    halves = merged(run, {"run": {"dir": str(tmp_path / "halves")}})
    run_ranks(train_all, 2, [run, merged(halves, {"train": {"steps": 5}}), halves])
    one, two = (find(tmp_path / n / "checkpoints")[-1] for n in ("whole", "halves"))
    weights = [{p.name: p.read_bytes() for p in c.path.glob("*.distcp")} for c in (one, two)]
    assert weights[0] == weights[1]
    one_losses, two_losses = ([r["metrics"] for r in reports(tmp_path / n, "train")] for n in ("whole", "halves"))
    assert one_losses == two_losses


def test_bad_settings_are_named() -> None:
    real = Schema(labels={"r": LabelColumn(kind="real")}, sparse=SCHEMA.sparse, groups=SCHEMA.groups)
    cohorts = Cohorts(**COHORTS)
    for config, key in (
        (reweighted.Config(cohorts=cohorts, head=-1.0), "head"),
        (group_dro.Config(cohorts=cohorts, step_size=math.nan), "step_size"),
        (pcgrad.Config(cohorts=cohorts, seed=-1), "seed"),
        (pcgrad.Config(cohorts=cohorts, seed=2**31), "seed"),
    ):
        (complaint,) = config.check(SCHEMA)
        assert complaint.key == key
        assert {c.key for c in config.check(real)} == {"name", key}
        config.cohorts = Cohorts(**{**COHORTS, "head": {"domain": 0}})
        assert {c.key for c in config.check(SCHEMA)} == {key, "cohorts.tail"}
