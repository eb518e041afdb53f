"""Crocodile (arXiv 2405.12706): the checkable properties of its covariance loss, per-domain loss and table sets.

The gates are tested in tests/nn/test_experts.py, the archs and the gradients of single domains in
tests/models/test_multi_domain.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec import cli, evaluate
from dist_rec.auxiliary import covariance
from dist_rec.config import RunConfig, from_mapping, load
from dist_rec.contract import ArchOutput
from dist_rec.data.batch import Batch
from dist_rec.data.schema import Schema
from dist_rec.recommender import build, distribute
from dist_rec.serving.tensor_file import read
from dist_rec.settings import ConfigError
from dist_rec.training.checkpoint import Checkpointer, find
from tests import runs
from tests.examples import config, global_batch, share
from tests.parity import sharded, unsharded, update_errors
from tests.ranks import run_ranks
from tests.sharded import runtime, whole

PRIOR = ["user", "item", "hour"]
ARCHS: dict[str, dict[str, Any]] = {
    "crocodile": {"prior": PRIOR, "num_experts": 3, "prior_dim": 4, "experts": [16, 8], "towers": [12]},
    "shared_bottom": {"bottom": [16, 8], "towers": [12]},
    "mmoe": {"num_experts": 3, "experts": [16, 8], "towers": [12]},
    "me_mmoe": {"num_experts": 2, "experts": [16, 8], "towers": []},
    "ple": {"levels": 2, "experts": [16, 8], "towers": [12]},
    "me_ple": {"experts": [16, 8], "towers": [12]},
    "stem": {"experts": [16, 8], "towers": [12]},
    "pepnet": {"domain_features": ["hour"], "prior": ["user", "item"], "prior_dim": 4, "widths": [16, 8]},
    "star": {"widths": [16, 8], "auxiliary": [5]},
}
ROWS, STEPS = 24, 4


def settings(arch: str = "crocodile", *, alpha: float | None = None, rows: int | None = None, **more: Any) -> RunConfig:
    """A run of an arch on three domains, with the per-domain loss, and the covariance loss where there is an alpha."""
    sections: dict[str, Any] = {
        "schema": {"groups": {"domain": {"column": "domain", "num_ids": 3}}},
        "model": {"name": arch, "dim": 8, **ARCHS[arch]},
        "objective": {"name": "bce", "mean_by": "domain"},
        "optim": {"tables": {"name": "adagrad", "lr": 0.1}, "dense": {"name": "sgd", "lr": 0.1}},
    }
    if alpha is not None:
        sections["auxiliary"] = {"covariance": {"alpha": alpha, "rows": rows}}
    return config(**{**sections, **more})


def one_domain_per_rank(batch: Batch) -> Batch:
    """The batch with its rows' domains in order, so that ranks miss domains, and padding at the end.

    A padding row has no ids; here it has some, and they must not matter.
    """
    domain = batch.groups["domain"].sort().values
    domain[-3:] = -1
    weights = batch.weights.clone()
    weights[-3:] = 0
    return replace(batch, groups={"domain": domain}, weights=weights)


def global_rows(schema: Schema, step: int) -> Batch:
    """The rows of all ranks."""
    return one_domain_per_rank(global_batch(schema, step, ROWS))


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


# Per-domain loss


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


def test_a_batch_of_padding_alone_costs_nothing() -> None:
    run = settings(alpha=0.1)
    batch = global_rows(run.schema, 0)
    model, _ = build(run, table_device="cpu")
    loss, _ = model(replace(batch, weights=torch.zeros(ROWS), groups={"domain": torch.full((ROWS,), -1)}))
    assert loss.item() == 0


# N ranks are one rank


def _gradients(rank: int, world_size: int, arch: str, rows: int | None) -> tuple[list[Tensor], list[Tensor], float]:
    """Gradients of the dense parameters, averaged as data parallelism does, of the looked-up rows, and the loss."""
    run = settings(arch, alpha=0.5 if arch in ("crocodile", "mmoe", "me_mmoe", "stem") else None, rows=rows)
    model, _ = build(run)
    batch = global_rows(run.schema, 0)
    generator = torch.Generator().manual_seed(5)
    tables = {
        s.name: torch.randn(ROWS, len(s.features), s.dim, generator=generator) for s in run.model.table_sets(run.schema)
    }
    here = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    looked_up = {name: rows[here].clone().requires_grad_() for name, rows in tables.items()}
    loss, _ = model.dense(share(batch, rank, world_size), looked_up)
    loss.backward()
    dense = [p.grad for p in model.dense.parameters()]
    for gradient in dense:
        dist.all_reduce(gradient)
    dist.all_reduce(loss := loss.detach())
    embeddings = []
    for rows_of_set in looked_up.values():
        parts = [torch.empty_like(rows_of_set) for _ in range(world_size)]
        dist.all_gather(parts, rows_of_set.grad)
        embeddings.append(torch.cat(parts) / world_size)
    return [g / world_size for g in dense], embeddings, loss.item() / world_size


def _assert_same(
    found: tuple[list[Tensor], list[Tensor], float], one: tuple[list[Tensor], list[Tensor], float]
) -> None:
    """Loss and gradient to 1e-6; of each tensor alone, where one number may be all there is, to 1e-5."""
    assert found[2] == pytest.approx(one[2], rel=1e-6)
    pairs = list(zip([*found[0], *found[1]], [*one[0], *one[1]], strict=True))
    mine, theirs = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    assert (mine - theirs).norm() <= 1e-6 * theirs.norm()
    for a, b in pairs:
        assert b.norm() > 0
        assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize("arch", ARCHS)
def test_loss_and_gradients_on_n_ranks_are_those_of_one(arch: str) -> None:
    (one,) = run_ranks(_gradients, 1, arch, None)
    for world_size in (2, 3):
        for found in run_ranks(_gradients, world_size, arch, None):
            _assert_same(found, one)


def test_the_same_rows_are_drawn_on_any_number_of_ranks() -> None:
    (one,) = run_ranks(_gradients, 1, "crocodile", 9)
    (of_all,) = run_ranks(_gradients, 1, "crocodile", None)
    assert one[2] != pytest.approx(of_all[2], rel=1e-3)
    for found in run_ranks(_gradients, 3, "crocodile", 9):
        _assert_same(found, one)


def _some_steps(rank: int, world_size: int, runs_of: list[RunConfig]) -> list[Any]:
    return sharded(rank, world_size, runs_of, STEPS, batch=global_rows)


MIXED = {"user": "row_wise", "items": "table_wise", "tags": "row_wise", "hour": "data_parallel"}
TABLES = {"tables": {table: {"sharding": kind} for table, kind in MIXED.items()}, "pooling": "mean"}
TRAININGS: dict[str, RunConfig] = {
    "crocodile": settings(alpha=0.5, embeddings=TABLES),
    "crocodile on 9 rows": settings(alpha=0.5, rows=9),
    "crocodile in wide tables": settings(alpha=0.5, embeddings={**TABLES, "layout": "wide"}),
    "crocodile of two-layer tables": settings(alpha=0.5, embeddings={**TABLES, "inner_dim": 12}),
    **{arch: settings(arch) for arch in ("ple", "me_ple", "stem", "pepnet", "star")},
}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sharded_trainings_equal_unsharded_ones(world_size: int) -> None:
    found = run_ranks(_some_steps, world_size, list(TRAININGS.values()))[0]
    for (name, run), result in zip(TRAININGS.items(), found, strict=True):
        inside, every = result.pipelined
        assert inside == every
        expected = unsharded(run, STEPS, global_rows)
        assert result.losses == pytest.approx(expected.losses, abs=1e-5), name
        for tensor, error in update_errors(result, expected).items():
            # Adagrad divides a gradient by its own size: where that is rounding, so is the update
            assert error < 1e-3, f"{name} on {world_size} ranks: the update of {tensor} is off by {error:.1e}"


def test_two_layer_tables_lie_inside_every_set() -> None:
    run = TRAININGS["crocodile of two-layer tables"]
    _, tables = build(run)
    factored = {t.name for t in tables if t.inner_dim == 12}
    for table_set in ("expert_0", "expert_1", "expert_2", "prior"):
        assert any(name.startswith(f"{table_set}_") for name in factored)
    assert {t.width for t in tables if t.inner_dim} == {12}


# Layouts of the table sets


def _columns(state: Mapping[str, Tensor], run: RunConfig) -> dict[str, Tensor]:
    """Every table set's columns of every table, by "<set>_<table>", and everything that is no table."""
    _, tables = build(run)
    found = {}
    for name, value in state.items():
        table = next((t for t in tables if name.endswith(f".{t.name}.weight")), None)
        if table is None:
            found[name] = value
            continue
        for block, part in zip(table.blocks, value.split([b.width for b in table.blocks], dim=1), strict=True):
            found[block.name] = part
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_wide_tables_train_as_separate_ones(optimizer: str, world_size: int) -> None:
    for sharding in ("table_wise", "row_wise", "column_wise"):
        layouts = []
        for layout in ("separate", "wide"):
            layouts.append(
                settings(
                    alpha=0.5,
                    embeddings={"layout": layout, "sharding": sharding, "pooling": "mean"},
                    sharding={"min_columns": 4},
                    optim={"tables": {"name": optimizer, "lr": 0.1}, "dense": {"name": "sgd", "lr": 0.1}},
                )
            )
        separate, wide = run_ranks(_some_steps, world_size, layouts)[0]
        assert {len(t.blocks) for t in build(layouts[1])[1]} == {3, 4}
        assert len(wide.plan) == 4 and len(separate.plan) == 4 * 3 + 3
        for when in ("before", "after"):
            theirs, mine = (
                _columns(getattr(result, when), run) for result, run in zip((separate, wide), layouts, strict=True)
            )
            assert mine.keys() == theirs.keys()
            for name, value in theirs.items():
                if when == "before" or world_size == 1:
                    assert torch.equal(mine[name], value), f"{sharding}: {name} {when}"
                # several ranks exchange the gradients of a wide row in other pieces, in another order of sums
                torch.testing.assert_close(mine[name], value, atol=1e-6, rtol=1e-5)


def test_row_wise_adagrad_is_another_optimiser_in_a_wide_table() -> None:
    optim = {"tables": {"name": "rowwise_adagrad", "lr": 0.1}, "dense": {"name": "sgd", "lr": 0.1}}
    layouts = [settings(optim=optim, embeddings={"layout": layout}) for layout in ("separate", "wide")]
    separate, wide = (_columns(unsharded(run, 2, global_rows).after, run) for run in layouts)
    assert not torch.allclose(separate["expert_0_user"], wide["expert_0_user"], atol=1e-3)


def test_a_wide_table_takes_settings_of_all_its_sets_only() -> None:
    with pytest.raises(ConfigError, match=r"embeddings.tables.expert_0_user: is for one table set.*name it 'user'"):
        settings(embeddings={"layout": "wide", "tables": {"expert_0_user": {"pooling": "mean"}}})
    with pytest.raises(ConfigError, match=r"embeddings.layout: is wide, but the tables of 'user' have two layers"):
        settings(embeddings={"layout": "wide", "inner_dim": 16})
    # a feature of one set keeps its own name and may have anything
    run = settings(embeddings={"layout": "wide", "tables": {"user": {"pooling": "mean"}}})
    tables = {t.name: t for t in build(run)[1]}
    assert tables["wide_user"].pooling == "mean" and tables["wide_items"].pooling == "sum"
    assert [b.name for b in tables["wide_user"].blocks] == [*(f"expert_{m}_user" for m in range(3)), "prior_user"]
    # the set "prior" asks for "item" alone, whose table "query" reads too
    assert tables["wide_items"].features == ("item", "query") and tables["wide_items"].dim == 3 * 8 + 4


# Switched off, resumed, trained


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(runs.write(tmp_path_factory.mktemp("data"), 600))


def _run(data: str, folder: Any, /, **sections: Any) -> dict[str, Any]:
    base = {
        "schema": {"groups": {"domain": {"column": "domain", "num_ids": 3}}},
        "objective": {"mean_by": "domain", "name": "bce"},
        "optim": {"tables": {"name": "adagrad", "lr": 0.05}},
        "train": {"steps": 12},
    }
    values = runs.values(data, folder, **runs.merged(base, sections))
    values["model"] = {"name": "crocodile", "prior": ["user", "item"], "dim": 8, "experts": [16, 8], "dropout": 0.2}
    return values


def _states(
    rank: int, world_size: int, runs_of: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    """The result of each run, and the weights of its newest checkpoint."""
    found = []
    for run, result in zip(runs_of, runs.train_all(rank, world_size, runs_of), strict=True):
        here, configured = runtime(rank, world_size), from_mapping(run)
        parts = distribute(configured, here)
        checkpoints = Checkpointer(Path(run["run"]["dir"]) / "checkpoints", configured.checkpoint, here)
        checkpoints.load(checkpoints.latest(), parts.model, None)
        found.append((result, whole(parts.model.state_dict())))
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_alpha_0_is_the_baseline_bit_for_bit(data: str, tmp_path: Any, world_size: int) -> None:
    """Property 8: dropout, data order and every update."""
    off = [
        _run(data, tmp_path / "absent"),
        _run(data, tmp_path / "zero", auxiliary={"covariance": {"alpha": 0.0}}),
        _run(data, tmp_path / "zero9", auxiliary={"covariance": {"alpha": 0.0, "rows": 9}}),
        _run(data, tmp_path / "on", auxiliary={"covariance": {"alpha": 5.0}}),
    ]
    (_, absent), *others = run_ranks(_states, world_size, off)[0]
    for (_, state), same in zip(others, (True, True, False), strict=True):
        assert {n for n in state if n not in absent} <= {"dense.auxiliaries.covariance.step"}
        assert all(torch.equal(state[n], value) for n, value in absent.items()) == same


def test_a_resumed_run_draws_the_rows_it_would_have_drawn(data: str, tmp_path: Any) -> None:
    auxiliary = {"covariance": {"alpha": 1.0, "rows": 8}}
    straight = _run(data, tmp_path / "whole", auxiliary=auxiliary)
    halves = [_run(data, tmp_path / "halves", auxiliary=auxiliary, train={"steps": n}) for n in (5, 12)]
    (_, a), = run_ranks(_states, 2, [straight])[0]  # fmt: skip
    run_ranks(runs.train_all, 2, halves[:1])
    (_, b), = run_ranks(_states, 2, halves[1:])[0]  # fmt: skip
    assert int(b["dense.auxiliaries.covariance.step"]) == 12
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert find(tmp_path / "halves" / "checkpoints")[-1].step == 12


def _evaluated(rank: int, world_size: int, runs_of: list[dict[str, Any]]) -> None:
    for run in runs_of:
        predictions = {"evaluate": {"predictions": f"{run['run']['dir']}/predictions.parquet"}}
        evaluate.run(from_mapping(runs.merged(run, predictions)))


def test_exports_score_as_evaluation_does_without_a_trace_of_the_loss(data: str, tmp_path: Path) -> None:
    """Every arch, Crocodile in every form of its tables: to 1e-6, as products of matrices at other addresses round
    otherwise, and to 1e-5 where two layers became one."""
    auxiliary = {"covariance": {"alpha": 1.0, "rows": 8}}
    trained = {
        "separate": _run(data, tmp_path / "separate", auxiliary=auxiliary),
        "wide": _run(data, tmp_path / "wide", auxiliary=auxiliary, embeddings={"layout": "wide"}),
        "two-layer": _run(data, tmp_path / "two-layer", auxiliary=auxiliary, embeddings={"inner_dim": 16}),
    }
    own = {"prior": ["user", "item"], "domain_features": ["item"]}
    for arch, settings_of in ARCHS.items():
        model = {"name": arch, "dim": 8, **settings_of, **{k: v for k, v in own.items() if k in settings_of}}
        trained[arch] = {**_run(data, tmp_path / arch), "model": model}
    for run in trained.values():
        run["data"] = {**run["data"], "test": data}
    run_ranks(runs.train_all, 2, list(trained.values()))
    run_ranks(_evaluated, 1, list(trained.values()))
    for name, run in trained.items():
        folder = Path(run["run"]["dir"])
        cli.main(["export", str(folder / "config.yaml")])
        cli.main(["predict", str(folder / "export"), data, str(folder / "out.parquet")])
        tensors = read(folder / "export" / "model.safetensors")
        assert not [n for n in tensors if "auxiliaries" in n or "objective" in n or "projections" in n]
        assert load(str(folder / "export" / "config.yaml")).auxiliary == {}
        files = ("predictions.parquet", "out.parquet")
        expected, got = (pq.read_table(folder / file)["logit_click"].to_numpy() for file in files)
        assert np.std(expected) > 0.01, f"{name} says something"
        assert np.abs(got - expected).max() <= (1e-5 if name == "two-layer" else 1e-6), name


def test_it_lowers_the_held_out_correlation_of_the_experts(data: str, tmp_path: Any) -> None:
    """Property 11, on one small run: without hurting AUC by more than noise."""
    steps = {"train": {"steps": 150, "epochs": None}, "data": {"test": data}}
    runs_of = [_run(data, tmp_path / "0", **steps)]
    runs_of.append(_run(data, tmp_path / "1", **steps, auxiliary={"covariance": {"alpha": 1.0}}))
    (without, off), (with_, on) = run_ranks(_states, 1, runs_of)[0]
    correlations = [_correlation(state, run) for state, run in ((off, runs_of[0]), (on, runs_of[1]))]
    assert correlations[1] < 0.8 * correlations[0]
    assert with_["metrics"]["test"]["auc"] > without["metrics"]["test"]["auc"] - 0.02


def _correlation(state: dict[str, Tensor], run: dict[str, Any]) -> float:
    """Mean |correlation| between columns of the two experts, on rows that nobody trained on."""
    configured = from_mapping(run)
    model, _ = build(configured, table_device="cpu")
    model.load_state_dict(state)
    model.eval()
    batch = global_batch(configured.schema, 99, 2000)
    with torch.no_grad():
        output = model.dense.arch(batch.dense, model.embeddings(batch.sparse), batch.groups)
    a, b = (output.representations[f"expert_{m}"] for m in (0, 1))
    a, b = ((x - x.mean(0)) / (x.std(0) + 1e-6) for x in (a, b))
    return float((a.T @ b / len(a)).abs().mean())


def test_unknown_domains_follow_the_declared_policy(data: str, tmp_path: Any) -> None:
    """The files have domains 0, 1 and 2."""
    unknown = {"domain": {"column": "domain", "num_ids": 2}}
    with pytest.raises(AssertionError, match=r"DataError.*group 'domain'.*2 is outside 0..1"):
        run_ranks(runs.train_all, 1, [_run(data, tmp_path / "error", schema={"groups": unknown})])
    shared = {"domain": {**unknown["domain"], "out_of_range": "reserved"}}
    ((result, state),) = run_ranks(_states, 1, [_run(data, tmp_path / "shared", schema={"groups": shared})])[0]
    assert state["dense.arch.mixture.towers.head.weight"].shape[0] == 3
    assert result["data_policies"]["train"]["group 'domain'.out_of_range=reserved"] > 0
