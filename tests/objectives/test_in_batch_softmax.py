"""The in-batch softmax against logits written out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_rec.contract import ArchOutput
from dist_rec.data.batch import Batch
from dist_rec.data.join import ITEM
from dist_rec.data.schema import Schema
from dist_rec.models.two_tower import Config as TwoTower
from dist_rec.objectives.in_batch_softmax import Config
from dist_rec.settings import parse
from tests import catalogues

SCHEMA: Schema = parse(Schema, catalogues.schema(), [])
ITEMS = [7, 9, 7, 4, 9, 2]
WEIGHTS = [1.0, 0.5, 2.0, 3.0, 0.0, 1.5]
EARLIER = [9, 9, 9, 2, 11, 9]


def make_batch(items: list[int], weights: list[float]) -> Batch:
    batch = Batch(torch.zeros(0), None, torch.zeros(0), torch.tensor(weights))  # type: ignore[arg-type]
    batch.groups = {ITEM: torch.tensor(items)}
    return batch


def by_hand(query: Tensor, item: Tensor, temperature: float, mask_same_item: bool, counted: list[int]) -> float:
    """counted: the items of all rows that `log_q` has seen; none without it."""
    rows = [i for i, weight in enumerate(WEIGHTS) if weight > 0]
    total = 0.0
    for i in rows:
        logits = {}
        for j in rows:
            if j == i or not mask_same_item or ITEMS[j] != ITEMS[i]:
                logits[j] = float(query[i].double() @ item[j].double()) / temperature
                if counted:
                    logits[j] -= math.log(counted.count(ITEMS[j]) / len(counted))
        total += WEIGHTS[i] * (math.log(sum(math.exp(logit) for logit in logits.values())) - logits[i])
    return total / len(ITEMS)  # padding too: B is the same on every rank


@pytest.mark.parametrize("mask_same_item", [True, False])
@pytest.mark.parametrize("log_q", [True, False])
def test_the_loss_is_that_of_logits_by_hand(mask_same_item: bool, log_q: bool) -> None:
    query, item = torch.randn(2, len(ITEMS), 5, generator=torch.Generator().manual_seed(0))
    config = Config(temperature=0.4, mask_same_item=mask_same_item, log_q=log_q)
    part = config.build(SCHEMA, {"query": 5, "item": 5})
    output, encode = ArchOutput(torch.zeros(0), {"query": query, "item": item}), _no_view
    part(output, make_batch(EARLIER, [1.0] * 6), encode)
    terms = part(output, make_batch(ITEMS, WEIGHTS), encode)
    counted = [*EARLIER, *(i for i, weight in zip(ITEMS, WEIGHTS, strict=True) if weight > 0)] if log_q else []
    assert list(terms) == ["in_batch_softmax"]
    assert terms["in_batch_softmax"].item() == pytest.approx(
        by_hand(query, item, 0.4, mask_same_item, counted), rel=1e-6
    )


def test_what_a_model_gives_in_bfloat16_is_compared_in_float32() -> None:
    torch.manual_seed(0)
    arch = TwoTower(dim=8, layers=[16, 8], similarity="dot").build(SCHEMA)
    features = sum(len(s.features) for s in TwoTower(dim=8).table_sets(SCHEMA))
    tables = {"main": 3 * torch.randn(len(ITEMS), features, 8)}
    with torch.autocast("cpu", torch.bfloat16):
        output = arch(torch.randn(len(ITEMS), len(SCHEMA.dense)), tables, {})
    query, item = (output.representations[name].detach() for name in ("query", "item"))
    assert query.dtype == item.dtype == torch.bfloat16
    part = Config(temperature=0.02).build(SCHEMA, {"query": 8, "item": 8})
    loss = part(output, make_batch(ITEMS, WEIGHTS), _no_view)["in_batch_softmax"]
    assert loss.dtype == torch.float32
    # a logit of 10 in bfloat16 is right to 0.03 at best
    assert loss.item() == pytest.approx(by_hand(query, item, 0.02, True, []), rel=1e-5)


def _no_view(view: str, change: Any = None) -> Tensor:
    raise AssertionError(f"in_batch_softmax asked for view {view}")
