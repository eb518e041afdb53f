"""Crocodile (arXiv 2405.12706) in training: N ranks are one, switched off, resumed, and what it is for.

The covariance loss alone is tested in tests/auxiliary/test_covariance.py, the per-domain loss in
tests/objectives/test_bce.py, layouts of the table sets in tests/embeddings/test_layouts.py, the gates in
tests/nn/test_experts.py, the archs and the gradients of single domains in tests/models/test_multi_domain.py, what is
served in tests/test_export.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_rec.config import RunConfig, from_mapping
from dist_rec.recommender import build, distribute
from dist_rec.training.checkpoint import Checkpointer, find
from tests import runs
from tests.domains import ARCHS, ROWS, STEPS, global_rows, settings, some_steps
from tests.examples import global_batch, share
from tests.parity import unsharded, update_errors
from tests.ranks import run_ranks
from tests.sharded import runtime, whole

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
    found: tuple[list[Tensor], list[Tensor], float], one: tuple[list[Tensor], list[Tensor], float], arch: str
) -> None:
    """Loss and gradient to 1e-6; of each tensor alone, where one number may be all there is, to 1e-5."""
    assert found[2] == pytest.approx(one[2], rel=1e-6), arch
    pairs = list(zip([*found[0], *found[1]], [*one[0], *one[1]], strict=True))
    mine, theirs = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    assert (mine - theirs).norm() <= 1e-6 * theirs.norm(), arch
    for a, b in pairs:
        assert b.norm() > 0, arch
        assert (a - b).norm() <= 1e-5 * b.norm(), arch


def _gradients_of_all(rank: int, world_size: int) -> list[tuple[list[Tensor], list[Tensor], float]]:
    return [_gradients(rank, world_size, arch, None) for arch in ARCHS]


def test_loss_and_gradients_on_n_ranks_are_those_of_one() -> None:
    (of_one,) = run_ranks(_gradients_of_all, 1)
    for world_size in (2, 3):
        for of_rank in run_ranks(_gradients_of_all, world_size):
            for arch, found, one in zip(ARCHS, of_rank, of_one, strict=True):
                _assert_same(found, one, arch)


def test_the_same_rows_are_drawn_on_any_number_of_ranks() -> None:
    (one,) = run_ranks(_gradients, 1, "crocodile", 9)
    (of_all,) = run_ranks(_gradients, 1, "crocodile", None)
    assert one[2] != pytest.approx(of_all[2], rel=1e-3)
    for found in run_ranks(_gradients, 3, "crocodile", 9):
        _assert_same(found, one, "crocodile")


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
    found = run_ranks(some_steps, world_size, list(TRAININGS.values()))[0]
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


def test_a_batch_of_padding_alone_costs_nothing() -> None:
    run = settings(alpha=0.1)
    batch = global_rows(run.schema, 0)
    model, _ = build(run, table_device="cpu")
    loss, _ = model(replace(batch, weights=torch.zeros(ROWS), groups={"domain": torch.full((ROWS,), -1)}))
    assert loss.item() == 0


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


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(data: str, tmp_path: Any) -> None:
    """What is neither a parameter nor the optimiser's: the covariance's count of draws, STAR's running statistics."""

    def models(folder: str, steps: int) -> list[dict[str, Any]]:
        drawn = {"auxiliary": {"covariance": {"alpha": 1.0, "rows": 8}}, "train": {"steps": steps}}
        star = {"name": "star", "dim": 8, **ARCHS["star"]}
        normalised = _run(data, tmp_path / folder / "star", train={"steps": steps})
        return [_run(data, tmp_path / folder / "crocodile", **drawn), {**normalised, "model": star}]

    straight = run_ranks(_states, 2, models("whole", 12))[0]
    run_ranks(runs.train_all, 2, models("halves", 5))
    resumed = run_ranks(_states, 2, models("halves", 12))[0]
    for (_, a), (_, b) in zip(straight, resumed, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert int(resumed[0][1]["dense.auxiliaries.covariance.step"]) == 12
    assert (resumed[1][1]["dense.arch.normalize.variance"] != 1).any(), "the statistics are in the checkpoint"
    assert find(tmp_path / "halves" / "star" / "checkpoints")[-1].step == 12


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
