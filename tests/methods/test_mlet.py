"""MLET's checkable properties (arXiv 2309.15881), on the framework's own tables wherever float32 can show them.

A table E (n, d) is trained as W1 (n, k) times W2 (k, d). G is the gradient with respect to E, non-zero only in the rows
of looked-up ids; lr the learning rate of plain SGD on both layers.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.config import RunConfig
from dist_rec.embeddings.mlet import FactoredCollection, ShardedFactoredCollection
from dist_rec.embeddings.sharding import initialise
from dist_rec.recommender import Distributed, build, served
from dist_rec.settings import ConfigError
from tests.examples import IDS, config, global_batch, mapping
from tests.parity import ROWS, Training, sharded, unsharded, update_errors
from tests.ranks import run_ranks

D, K, LR = 8, 16, 0.5
FIRST, SECOND = "embeddings.collection.embedding_bags.main_{}.weight", "embeddings.projections.main_{}"
TABLES = ("user", "items", "tags")  # "hour" has too few rows and stays single-layer
KINDS = ("row_wise", "table_wise", "data_parallel")
MIXED = {"user": "row_wise", "items": "table_row_wise", "tags": "table_wise", "hour": "data_parallel"}


def _config(
    sharding: str | dict[str, str] = "row_wise", *, lr: float = LR, table_optimizer: str = "sgd", **embeddings: Any
) -> RunConfig:
    per_table = sharding if isinstance(sharding, dict) else dict.fromkeys((*TABLES, "hour"), sharding)
    return config(
        # first values and learning rate so large that updates stand high above the rounding of what is updated
        embeddings={
            "tables": {t: {"sharding": s} for t, s in per_table.items()},
            "inner_dim": K,
            "init_bound": 1.0,
            **embeddings,
        },
        optim={"tables": {"name": table_optimizer, "lr": lr}, "dense": {"name": "sgd", "lr": lr}},
        model={"name": "dlrm", "dim": D, "bottom": [16], "top": [16]},
    )


def _layers(parameters: dict[str, Tensor], table: str) -> tuple[Tensor, Tensor]:
    return parameters[FIRST.format(table)], parameters[SECOND.format(table)]


def _seen(table: str) -> Tensor:
    """(n,) bool: the rows of a table that the first step looks up."""
    schema = config().schema
    batch = global_batch(schema, 0, ROWS).sparse.to_dict()
    seen = torch.zeros(IDS[{"items": "item"}.get(table, table)], dtype=torch.bool)
    for feature, column in schema.sparse.items():
        if (column.table or feature) == table:
            seen[batch[feature].values()] = True
    return seen


# Collapse


@pytest.mark.parametrize("pooling", ["sum", "mean", "weighted"])
@pytest.mark.parametrize("project", ["before", "after"])
def test_collapsed_tables_give_the_same_logits(pooling, project):
    """Pooling by sum, by mean and by weighted sum commutes with the second layer."""
    sparse = mapping()["schema"]["sparse"]
    sparse["tags"] |= {"weights": "tag_weights"} if pooling == "weighted" else {}
    pooled = {} if pooling == "weighted" else {"pooling": pooling}
    values = mapping(schema={"sparse": sparse}, embeddings={"inner_dim": K, "project": project, **pooled})
    settings = config(**values)
    model, tables = build(settings, table_device="cpu")
    initialise(model.state_dict(), tables, seed=1)
    state = {name: p.detach() * 3 for name, p in model.state_dict().items()}  # so that logits are not all alike
    model.load_state_dict(state)
    plain = served(settings)
    collapsed = {n: t for n, t in state.items() if ".projections." not in n}
    for table in TABLES:
        w1, w2 = _layers(state, table)
        collapsed[FIRST.format(table)] = w1 @ w2
    plain.load_state_dict(collapsed, strict=True, assign=True)
    batch = global_batch(settings.schema, 0, 64)
    with torch.no_grad():
        logits, expected = plain.logits(batch), model.logits(batch)
    assert expected.std() > 0.01
    assert (logits - expected).abs().max() < 1e-5
    count = sum(t.numel() for t in plain.state_dict().values())
    vanilla, _ = build(config(**{**values, "embeddings": pooled}))
    assert count == sum(t.numel() for t in vanilla.state_dict().values()), "as many parameters as a plain model"


def test_pooling_that_does_not_commute_with_the_projection_is_no_option():
    """The largest of projected rows is not the projection of the largest rows."""
    rows, w2 = torch.randn(5, K), torch.randn(K, D)
    assert not torch.allclose((rows @ w2).amax(0), rows.amax(0) @ w2, atol=0.1)
    for at in ({"pooling": "max"}, {"tables": {"tags": {"pooling": "max"}}}):
        with pytest.raises(ConfigError, match=r"pooling: is 'max'; expected one of sum, mean"):
            config(embeddings={"inner_dim": K, **at})


# One step


@pytest.fixture(scope="module")
def one_step() -> Training:
    """A step of SGD on two ranks, tables of every sharding that projects on its shard."""
    return run_ranks(sharded, 2, [_config(MIXED)], 1)[0][0]


@pytest.mark.parametrize("table", TABLES)
def test_a_step_changes_the_seen_rows_of_w1_and_every_row_of_e(one_step, table):
    (w1, w2), (w1_after, w2_after) = (_layers(p, table) for p in (one_step.before, one_step.after))
    seen = _seen(table)
    assert 0 < seen.sum() < len(seen)
    assert torch.equal(w1_after[~seen], w1[~seen]), "rows that no id asked for are the same bits"
    assert (w1_after[seen] != w1[seen]).any(1).all()
    assert (w2_after != w2).all()
    moved = (w1_after @ w2_after - w1 @ w2).norm(dim=1)
    assert (moved > 0).all(), "every category learns from those in the batch"


def test_a_frozen_second_layer_never_moves_an_unseen_category():
    """The authors' control "RP"."""
    for result in run_ranks(sharded, 2, [_config(MIXED, train_projection=False)], 1)[0]:
        for table in TABLES:
            (w1, w2), (w1_after, w2_after) = (_layers(p, table) for p in (result.before, result.after))
            seen = _seen(table)
            assert torch.equal(w2_after, w2)
            assert torch.equal((w1_after @ w2)[~seen], (w1 @ w2)[~seen])
            assert (w1_after[seen] != w1[seen]).any(1).all()


def test_the_first_layer_is_the_table_optimisers_and_the_second_the_dense_ones():
    """Its learning rate, weight decay and clipping too."""
    optim = {"tables": {"name": "sgd", "lr": LR}, "dense": {"name": "sgd", "lr": 0.1, "weight_decay": 0.5}}
    settings = config(embeddings={"inner_dim": K}, optim={**optim, "clip_norm": 1e-9})
    (result,) = run_ranks(sharded, 1, [settings], 1)[0]
    for table in TABLES:
        (w1, w2), (w1_after, w2_after) = (_layers(p, table) for p in (result.before, result.after))
        assert torch.equal(w1_after[~_seen(table)], w1[~_seen(table)]) and (w1_after - w1).abs().max() > 1e-4
        torch.testing.assert_close(w2_after, w2 * (1 - 0.1 * 0.5), msg="it decays, and its gradient is clipped away")


def _make_identities(parts: Distributed) -> None:
    with torch.no_grad():
        for name, parameter in parts.model.named_parameters():
            if ".projections." in name:
                parameter.copy_(torch.eye(*parameter.shape))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_frozen_identity_is_the_plain_model_bit_for_bit(world_size):
    cases = [(kind, optimizer) for kind in (*KINDS, MIXED) for optimizer in ("sgd", "rowwise_adagrad")]
    frozen = [
        _config(kind, table_optimizer=o, inner_dim=D, project=project, train_projection=False)
        for kind, o in cases
        for project in ("before", "after")
    ]
    plain = [_config(kind, table_optimizer=o, inner_dim=None) for kind, o in cases for _ in ("before", "after")]
    expected = run_ranks(sharded, world_size, plain)[0]
    for found, right in zip(run_ranks(sharded, world_size, frozen, 6, _make_identities)[0], expected, strict=True):
        assert found.losses == right.losses
        assert {n for n in found.after if ".projections." in n} == found.after.keys() - right.after.keys() != set()
        for name, value in right.after.items():
            assert torch.equal(found.after[name], value), name


# The identities behind it, in float64


def _loss(e: Tensor, seen: Tensor) -> Tensor:
    """Any loss that is curved and reads some rows."""
    return torch.nn.functional.softplus(e[seen].sum(1) * 3).sum() + e[seen].sin().sum()


def _sgd(w1: Tensor, w2: Tensor, seen: Tensor, lr: float) -> tuple[Tensor, Tensor, Tensor]:
    """W1, W2 after a step of SGD on both, and G."""
    w1, w2 = w1.clone().requires_grad_(), w2.clone().requires_grad_()
    e = w1 @ w2
    e.retain_grad()
    _loss(e, seen).backward()
    assert e.grad is not None and w1.grad is not None and w2.grad is not None
    with torch.no_grad():
        return w1 - lr * w1.grad, w2 - lr * w2.grad, e.grad


def _draw(dtype: torch.dtype, n: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    w1, w2 = torch.randn(n, K, generator=generator) / 4, torch.randn(K, D, generator=generator) / 4
    return w1.to(dtype), w2.to(dtype), torch.tensor([3, 7, 150])


def test_one_step_of_sgd_changes_e_as_equation_9_says():
    w1, w2, seen = _draw(torch.float64)
    w1_after, w2_after, g = _sgd(w1, w2, seen, LR)
    change = w1_after @ w2_after - w1 @ w2
    expected = -LR * (g @ w2.T @ w2 + w1 @ w1.T @ g) + LR**2 * g @ w2.T @ w1.T @ g
    assert (change - expected).abs().max() < 1e-12
    assert (change.norm(dim=1) > 1e-6).all() and (g.norm(dim=1) > 0).sum() == 3, "three rows are seen, all move"


def test_its_first_order_weighs_directions_by_the_singular_values_as_equation_10_says():
    w1, w2, seen = _draw(torch.float64)
    *_, g = _sgd(w1, w2, seen, LR)
    first = g @ w2.T @ w2 + w1 @ w1.T @ g
    (u, s, _), (_, t, q) = torch.linalg.svd(w1), torch.linalg.svd(w2)  # q: its rows are the q_j
    squares = torch.cat([s**2, torch.zeros(len(w1) - K, dtype=w1.dtype)])  # W1 has K directions, G any
    expected = u @ ((squares[:, None] + t**2) * (u.T @ g @ q.T)) @ q
    assert (first - expected).abs().max() < 1e-12


def test_the_module_takes_the_same_step():
    """The float64 reference above is what the framework's collection does in float32."""
    w1, w2, seen = _draw(torch.float32)
    projection = torch.nn.Parameter(w2.clone())
    tables = [EmbeddingBagConfig(name="t", num_embeddings=len(w1), embedding_dim=K, feature_names=["f"])]
    module = FactoredCollection(tables, {"t": projection}, is_weighted=False, device=torch.device("cpu"))
    first = module.embedding_bags["t"].weight
    with torch.no_grad():
        first.copy_(w1)
    ids = KeyedJaggedTensor(keys=["f"], values=seen, lengths=torch.ones(len(seen), dtype=torch.int32))
    e = torch.zeros(len(w1), D).index_copy(0, seen, module(ids).values())
    _loss(e, seen).backward()
    w1_right, w2_right, _ = _sgd(*_draw(torch.float64), LR)
    for found, start, right in ((first, w1, w1_right), (projection, w2, w2_right)):
        update = (found - LR * found.grad - start).double()
        assert (update - (right - start.double())).norm() < 1e-5 * update.norm()


def _drift(w1: Tensor, w2: Tensor, w1_after: Tensor, w2_after: Tensor) -> tuple[float, float]:
    """How far W1'W1 - W2W2' has moved, and how far W1'W1 alone."""
    grown, other = w1_after.T @ w1_after - w1.T @ w1, w2_after @ w2_after.T - w2 @ w2.T
    return (grown - other).norm().item(), grown.norm().item()


def test_what_gradient_flow_conserves_drifts_in_proportion_to_the_learning_rate():
    w1, w2, seen = _draw(torch.float64)
    drifts = []
    for halvings in range(3):
        a, b = w1, w2
        for _ in range(20 * 2**halvings):
            a, b, _ = _sgd(a, b, seen, 0.01 / 2**halvings)
        drifts.append(_drift(w1, w2, a, b))
    for (drift, moved), (half, _) in pairwise(drifts):
        assert half == pytest.approx(drift / 2, rel=0.1)
        assert drift < 0.1 * moved


@pytest.mark.parametrize("world_size", [1, 2])
def test_sharded_training_conserves_it_too(world_size):
    """Another way to see a wrong factor on the gradient of W2: the two layers must move in step."""
    (result,) = run_ranks(sharded, world_size, [_config(MIXED, lr=0.01)], 6)[0]
    for table in TABLES:
        layers = (*_layers(result.before, table), *_layers(result.after, table))
        drift, moved = _drift(*(x.double() for x in layers))
        assert drift < 0.01 * moved, table


# First values


def _std(settings: RunConfig) -> list[float]:
    model, tables = build(settings, table_device="cpu")
    state = model.state_dict()
    initialise(state, tables, seed=2, projection_init=settings.embeddings.projection_init)
    return [(_product(state, t.name[5:]).std() / (t.init_bound / math.sqrt(3))).item() for t in tables]


def _product(state: dict[str, Tensor], table: str) -> Tensor:
    w1, w2 = state[FIRST.format(table)], state.get(SECOND.format(table))
    return w1 if w2 is None else w1 @ w2


@pytest.mark.parametrize("k", [None, 16, 64, 128])
def test_the_first_e_has_a_plain_tables_scale_or_the_prototypes(k):
    """std(E) = sqrt(k) std(W1) std(W2). The authors draw W2 with sigma 0.25 for every k."""
    sparse = {f"f{i}": {"num_ids": 3000} for i in range(8)}
    values = {"schema": {"sparse": sparse, "labels": {"y": None}}, "model": {"name": "dcn", "dim": 16}}
    values["data"] = {"train": "unused", "batch_size": 4}
    mean = {}
    for kind in ("scaled", "prototype"):
        stds = _std(config(**values, embeddings={"inner_dim": k, "projection_init": kind}))
        mean[kind] = sum(stds) / len(stds)
    assert mean["scaled"] == pytest.approx(1, abs=0.04)
    assert mean["prototype"] == pytest.approx({16: 1, 64: 2, 128: 2.83}.get(k, 1), rel=0.04)


# Any number of ranks, before and after


FAST = 2.0  # a learning rate at which 1e-6 of an update is about what rounding leaves of it


def test_one_two_and_three_ranks_agree_and_so_do_before_and_after():
    """Element by element to 1e-6, on the update of every parameter, W1 and W2 among them."""
    cases = [_config(kind, project=p, pooling="mean", lr=FAST) for p in ("before", "after") for kind in (*KINDS, MIXED)]
    results = {world_size: run_ranks(sharded, world_size, cases)[0] for world_size in (1, 2, 3)}
    one = results[1][0]
    for table in TABLES:
        for after, before in zip(_layers(one.after, table), _layers(one.before, table), strict=True):
            assert (after - before).abs().max() > 0.01, "updates are large against what is allowed"
    for world_size, found in results.items():
        for settings, training in zip(cases, found, strict=True):
            case = world_size, settings.embeddings.project, settings.embeddings.tables
            assert max(update_errors(training, one).values()) < 5e-6, case
            assert max((training.after[n] - one.after[n]).abs().max() for n in one.after) < 1e-6, case


def _without_factor(rank: int, world_size: int, configs: list[RunConfig]) -> list[Training]:
    """As if nobody had thought of the sum over shards."""
    right = ShardedFactoredCollection._scale
    ShardedFactoredCollection._scale = lambda self, sharding_type: 1
    try:
        return sharded(rank, world_size, configs)
    finally:
        ShardedFactoredCollection._scale = right


def test_a_wrong_factor_on_the_gradient_of_w2_is_noticed():
    settings = _config(MIXED, lr=FAST)
    expected = unsharded(settings)
    (right,), (wrong,) = (run_ranks(f, 2, [settings])[0] for f in (sharded, _without_factor))
    assert max(update_errors(right, expected).values()) < 5e-6
    errors = update_errors(wrong, expected)
    for table in TABLES:
        assert errors[SECOND.format(table)] > 0.4, "about half the gradient on two ranks"


def test_losses_would_hardly_say_so():
    """Why updates are compared: at an ordinary learning rate half a step moves the loss by next to nothing."""
    settings = _config(MIXED, lr=0.01, init_bound=None)
    expected = unsharded(settings)
    (wrong,) = run_ranks(_without_factor, 2, [settings])[0]
    assert wrong.losses == pytest.approx(expected.losses, abs=1e-5)
    assert update_errors(wrong, expected)[SECOND.format("user")] > 0.4
