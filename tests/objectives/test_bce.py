"""BCE against numbers computed by hand, and its independence of the number of ranks; the mean by domain."""

from __future__ import annotations

import math

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.contract import ArchOutput
from dist_rec.data.batch import Batch
from dist_rec.data.schema import LabelColumn, Schema, SparseColumn
from dist_rec.objectives.bce import Config
from dist_rec.recommender import build
from tests.domains import ROWS, one_domain_per_rank, settings
from tests.examples import global_batch


def make_schema(**labels: LabelColumn) -> Schema:
    return Schema(labels=labels, sparse={"s": SparseColumn(num_ids=2)})


SCHEMA = make_schema(click=LabelColumn(), buy=LabelColumn())


def make_batch(labels: torch.Tensor, weights: torch.Tensor) -> Batch:
    empty = KeyedJaggedTensor.from_lengths_sync(["s"], torch.zeros(0).long(), torch.zeros(len(labels)).long())
    return Batch(dense=torch.zeros(len(labels), 0), sparse=empty, labels=labels, weights=weights)


def encode(view: str) -> torch.Tensor:
    raise AssertionError(f"bce asked for view {view}")


def loss(config: Config, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    terms = config.build(SCHEMA, {})(ArchOutput(logits, {}), make_batch(labels, weights), encode)
    assert list(terms) == ["bce"]
    return terms["bce"]


def test_equals_the_hand_computed_sum() -> None:
    # p = 3/4 and 1/2 for click, 1/5 for buy; the third row is padding and only counts in the divisor.
    logits = torch.tensor([[math.log(3), math.log(1 / 4)], [0.0, math.log(1 / 4)], [9.0, 9.0]])
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    weights = torch.tensor([1.0, 2.0, 0.0])
    click = 1 * math.log(4 / 3) + 2 * math.log(2)
    buy = 1 * math.log(5 / 4) + 2 * math.log(5)
    assert loss(Config(), logits, labels, weights).item() == pytest.approx((click + buy) / 3, rel=1e-6)
    halved = Config(label_weights={"buy": 0.5})
    assert loss(halved, logits, labels, weights).item() == pytest.approx((click + buy / 2) / 3, rel=1e-6)


def test_mean_over_ranks_is_the_one_rank_loss_and_gradient() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 2, requires_grad=True)
    labels = torch.randint(0, 2, (12, 2)).float()
    weights = torch.rand(12)
    weights[9:] = 0  # the padding lies on the last rank only: a divisor by weights would be wrong there
    one = loss(Config(), logits, labels, weights)
    (one_grad,) = torch.autograd.grad(one, logits)
    for world in (2, 3, 4):
        shares = zip(logits.chunk(world), labels.chunk(world), weights.chunk(world), strict=True)
        mean = torch.stack([loss(Config(), *share) for share in shares]).mean()
        torch.testing.assert_close(mean, one, rtol=1e-6, atol=0)
        torch.testing.assert_close(torch.autograd.grad(mean, logits)[0], one_grad, rtol=1e-6, atol=1e-9)


def test_float32_under_autocast_and_large_logits() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(Config(), torch.tensor([[200.0, -200.0]]).bfloat16(), torch.tensor([[0.0, 1.0]]), torch.ones(1))
    assert value.dtype == torch.float32
    assert value.item() == 400.0


def test_refuses_real_labels_and_unknown_or_bad_factors() -> None:
    assert list(Config(label_weights={"buy": 0.0}).check(SCHEMA)) == []
    (complaint,) = Config().check(make_schema(click=LabelColumn(), rating=LabelColumn(kind="real")))
    assert complaint.key == "name"
    assert "'rating' has kind: real" in complaint.text
    found = {c.key: c.text for c in Config(label_weights={"by": 1.0, "buy": -1.0}).check(SCHEMA)}
    assert "known: click, buy" in found["label_weights.by"]
    assert "is -1.0" in found["label_weights.buy"]


@pytest.mark.parametrize("labels", [1, 2])
def test_every_domain_weighs_the_same(labels: int) -> None:
    groups = {"domain": {"column": "domain", "num_ids": 4}}
    objective = {"name": "bce", "mean_by": "domain", "label_weights": {"click": 0.5}}
    schema = {"labels": dict.fromkeys(["click", "buy"][:labels]), "groups": groups}
    run = settings("shared_bottom", schema=schema, objective=objective)
    batch = one_domain_per_rank(global_batch(run.schema, 0, ROWS))
    batch.weights[:5] = 2.0
    model, _ = build(run, table_device="cpu")
    loss, left = model(batch)
    expected, factors = 0.0, torch.tensor([0.5, 1.0][:labels])
    for s in range(4):
        here = (batch.groups["domain"] == s) & (batch.weights > 0)
        if here.any():  # nobody is in domain 3
            z, y = left.predictions[here].double(), batch.labels[here].double()
            rows = torch.nn.functional.binary_cross_entropy_with_logits(z, y, reduction="none") * factors
            expected += float((batch.weights[here] * rows.sum(1)).sum() / here.sum())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
