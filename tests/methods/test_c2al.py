"""C2AL by its checkable properties: labels, losses and gradients by hand, the random control, bad settings.

Training with it is in test_c2al_training.py; the cohorts that a run finds, and what divergences are, in tests/metrics;
whether the heads help in test_recovery.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.auxiliary.c2al import C2AL, Config, RandomCohorts, auxiliary_labels, drawn
from dist_rec.config import ConfigError, from_mapping, to_mapping
from dist_rec.contract import ArchOutput
from dist_rec.data.batch import Batch
from dist_rec.data.cohorts import Cohorts
from dist_rec.data.schema import GroupColumn, LabelColumn, Schema, SparseColumn
from dist_rec.recommender import build
from tests import examples
from tests.examples import COHORTS
from tests.runs import values

SCHEMA = Schema(
    labels={"click": LabelColumn(), "buy": LabelColumn()},
    sparse={"s": SparseColumn(num_ids=2)},
    groups={"domain": GroupColumn("domain"), "row": GroupColumn("row")},
)


def settings(**changes: Any) -> dict[str, Any]:
    """`auxiliary.c2al` on the cohorts of the examples."""
    return {"cohorts": COHORTS, "lambda_head": 0.5, "lambda_tail": 0.25, **changes}


def make_batch(labels: torch.Tensor, weights: torch.Tensor, **groups: torch.Tensor) -> Batch:
    empty = KeyedJaggedTensor.from_lengths_sync(["s"], torch.zeros(0).long(), torch.zeros(len(labels)).long())
    return Batch(torch.zeros(len(labels), 0), empty, labels, weights, groups)


def encode(view: str) -> torch.Tensor:
    raise AssertionError(f"c2al asked for view {view}")


def heads(width: int = 3, **changes: Any) -> C2AL:
    """The heads of a model whose representation "shared" has that width."""
    return Config(**{**settings(label="buy", **changes), "cohorts": Cohorts(**COHORTS)}).build(
        SCHEMA, {"shared": width}
    )


def test_labels_are_those_of_the_cohort_and_partial_elsewhere() -> None:
    torch.manual_seed(0)
    y = torch.randint(0, 2, (500,)).float()
    masks = Cohorts(**COHORTS).masks({"domain": torch.randint(-1, 4, (500,))})
    assert masks.head.any() and masks.tail.any() and not (masks.head | masks.tail).all()
    found = auxiliary_labels(y, masks)
    head, tail = found["head"], found["tail"]
    assert (head + tail <= y).all() and (head * tail == 0).all()
    assert head.sum() == y[masks.head].sum() > 0 and tail.sum() == y[masks.tail].sum() > 0
    assert head[y == 0].sum() == tail[y == 0].sum() == 0
    # the truth table of (y, y_head, y_tail)
    triples = set(zip(y.tolist(), head.tolist(), tail.tolist(), strict=True))
    assert triples == {(1, 1, 0), (1, 0, 1), (1, 0, 0), (0, 0, 0)}


def test_loss_and_gradient_equal_those_computed_by_hand() -> None:
    module = heads()
    h = torch.tensor([[1.0, 2, 3], [0, -1, 1], [2, 0, 0], [5, 5, 5]], requires_grad=True)
    labels = torch.tensor([[0.0, 1], [1, 1], [1, 0], [1, 1]])  # y is "buy", the second
    weights = torch.tensor([1.0, 2, 0.5, 0])  # the last row is padding
    domain = torch.tensor([2, 0, 2, -1])
    terms = module(ArchOutput(torch.zeros(4, 2), {"shared": h}), make_batch(labels, weights, domain=domain), encode)
    assert list(terms) == ["c2al/head", "c2al/tail"]
    expected_grad = torch.zeros_like(h)
    for name, factor, targets in (("head", 0.5, [1, 0, 0, 0]), ("tail", 0.25, [0, 1, 0, 0])):
        (w, b), expected = module.heads[name].parameters(), 0.0
        for row in range(4):
            z = (h[row] @ w[0] + b).item()
            p = 1 / (1 + math.exp(-z))
            expected -= factor * float(weights[row]) / 4 * math.log(p if targets[row] else 1 - p)
            expected_grad[row] += factor * weights[row] / 4 * (p - targets[row]) * w[0].detach()
        assert terms[f"c2al/{name}"].item() == pytest.approx(expected, rel=1e-5)
    torch.stack(list(terms.values())).sum().backward()
    torch.testing.assert_close(h.grad, expected_grad, rtol=1e-5, atol=1e-7)


def test_heads_start_at_the_logit_of_their_rates() -> None:
    for module, rates in ((heads(), (0.15, 0.1)), (heads(hidden=[4], head_rate=0.001), (0.001, 0.1))):
        for head, rate in zip(module.heads.values(), rates, strict=True):
            assert torch.sigmoid(head[-1].bias).item() == pytest.approx(rate, rel=1e-5)


def test_a_head_without_weight_is_not_there() -> None:
    assert list(heads(lambda_head=0.0).heads) == ["tail"]
    off = heads(lambda_head=0.0, lambda_tail=0.0)
    assert not list(off.parameters())
    assert off(ArchOutput(torch.zeros(1, 2), {}), make_batch(torch.zeros(1, 2), torch.ones(1)), encode) == {}


def test_a_wide_range_representation_stays_float32_under_autocast() -> None:
    h, labels = torch.randn(4, 3), torch.zeros(4, 2)
    batch = make_batch(labels, torch.ones(4), domain=torch.zeros(4).long())
    terms = heads()(ArchOutput(torch.zeros(4, 2), {"shared": h.bfloat16()}), batch, encode)
    assert all(term.dtype == torch.float32 for term in terms.values())


def test_random_cohorts_have_the_mass_and_depend_on_nothing_but_value_and_seed() -> None:
    cohorts = Cohorts(**{**COHORTS, "head_mass": 0.05, "tail_mass": 0.2, "head_rate": 0.01, "tail_rate": 0.04})
    rows = torch.arange(200_000)
    head, tail = drawn(cohorts, RandomCohorts("row"))({"row": rows})
    for mask, mass in ((head, 0.05), (tail, 0.2)):
        assert abs(mask.float().mean().item() - mass) < 5 * math.sqrt(mass * (1 - mass) / len(rows))
        # neighbours are drawn apart: the share of pairs is the square
        assert abs((mask[1:] & mask[:-1]).float().mean().item() - mass**2) < 0.005
    assert not (head & tail).any()
    order = torch.randperm(len(rows))
    again = drawn(cohorts, RandomCohorts("row"))({"row": rows[order]})
    assert torch.equal(again.head, head[order]) and torch.equal(again.tail, tail[order])
    other = drawn(cohorts, RandomCohorts("row", seed=1))({"row": rows}).head
    assert abs((other & head).float().mean().item() - 0.05**2) < 0.002
    negative = drawn(cohorts, RandomCohorts("row"))({"row": -rows}).head
    assert abs(negative.float().mean().item() - 0.05) < 0.003


def test_random_heads_start_at_the_rate_of_all_rows_in_the_cohorts() -> None:
    module = heads(random=RandomCohorts("row"))  # 0.25 positive among 0.6, so 0.125 among each 0.3
    for head in module.heads.values():
        assert torch.sigmoid(head[-1].bias).item() == pytest.approx(0.125, rel=1e-5)


def test_bad_settings_are_named_together(tmp_path: Path) -> None:
    good = Config(**settings(label="buy", cohorts=Cohorts(**COHORTS)))
    assert list(good.check(SCHEMA)) == []
    bad = {"lambda_head": -1.0, "hidden": [0], "random": RandomCohorts("users"), "label": "by"}
    found = {c.key: c.text for c in Config(**{**vars(good), **bad}).check(SCHEMA)}
    assert found.keys() == {"lambda_head", "hidden", "random.group", "label"}
    assert "known: domain, row" in found["random.group"]
    (large,) = Config(**{**vars(good), "random": RandomCohorts("row", seed=2**63)}).check(SCHEMA)
    assert large.key == "random.seed" and "does not fit int64" in large.text

    def complaint(**changes: Any) -> tuple[str, str]:
        cohorts = Cohorts(**{**COHORTS, **changes.pop("cohort", {})})
        ((key, text),) = Config(**{**vars(good), "cohorts": cohorts, **changes}).check(SCHEMA)
        return key, text

    assert complaint(label=None) == ("label", "is needed where the schema has several labels: choose one of click, buy")
    assert "count 'click'" in complaint(cohort={"label": "click"})[1]
    assert complaint(cohort={"tail_rate": 0.0})[0] == "tail_rate"
    off = {**vars(good), "cohorts": Cohorts(**{**COHORTS, "tail_rate": 0.0}), "lambda_tail": 0.0}
    assert list(Config(**off).check(SCHEMA)) == [], "a head that is off needs no rate"
    assert complaint(cohort={"axes": ["age"], "edges": {"age": None}, "head": {"age": 1}, "tail": {"age": 0}})[0] == (
        "cohorts.axes"
    )
    assert complaint(cohort={"head": {"domain": 0}})[0] == "cohorts.tail"
    path = str(tmp_path / "cohorts.json")
    (missing,) = Config(cohorts=path, label="buy").check(SCHEMA)
    assert missing.key == f"cohorts.{path}" and "dist-rec cohorts" in missing.text
    schema = Schema(labels={"rating": LabelColumn(kind="real")}, sparse=SCHEMA.sparse, groups=SCHEMA.groups)
    (kind,) = Config(**settings(cohorts=Cohorts(**COHORTS))).check(schema)
    assert "binary" in kind.text


def test_an_unknown_representation_is_named_with_those_there_are() -> None:
    config = examples.config(
        schema={"groups": {"domain": {"column": "d"}}}, auxiliary={"c2al": settings(representation="x")}
    )
    with pytest.raises(ConfigError, match=r"auxiliary.c2al.representation: is 'x'.*known: shared"):
        build(config)


def test_the_saved_config_carries_the_cohorts_and_needs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "cohorts.json"
    path.write_text(json.dumps(COHORTS))
    run = values("unused", tmp_path / "run", auxiliary={"c2al": settings(cohorts=str(path))})
    saved = to_mapping(from_mapping(run))
    assert saved["auxiliary"]["c2al"]["cohorts"] == {**COHORTS, "label": None, "columns": None, "path": str(path)}
    path.unlink()
    assert to_mapping(from_mapping(saved)) == saved
    with pytest.raises(ConfigError, match=r"auxiliary.c2al.cohorts.*cannot be read"):
        from_mapping(run)
