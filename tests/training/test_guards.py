"""What keeps a run from being ruined, and that learning rates, clipping, stopping and evaluation do what they say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dist_rec import evaluate, train
from dist_rec.config import RunConfig, from_mapping
from dist_rec.data.batch import Batch
from dist_rec.embeddings.sharding import initialise
from dist_rec.recommender import build, distribute
from dist_rec.training.checkpoint import find
from dist_rec.training.optim import Schedule, StepOptimizer, _check_owners
from dist_rec.training.trainer import GuardedPipeline, TrainingStopped
from tests.examples import config, global_batch, share
from tests.ranks import run_ranks
from tests.runs import merged, reports, table, train_all, values, write
from tests.sharded import local, runtime, whole

MIXED = {"user": "row_wise", "items": "table_wise", "tags": "column_wise", "hour": "data_parallel"}
ROWS = 12


def _settings(**optim: Any) -> RunConfig:
    defaults = {"tables": {"name": "adagrad", "lr": 0.1}, "dense": {"name": "sgd", "lr": 0.1}}
    return config(
        embeddings={"tables": {t: {"sharding": s} for t, s in MIXED.items()}},
        sharding={"min_columns": 4},
        optim=merged(defaults, optim),
    )


# Values that are not finite


def _poisoned(batches: Iterator[Batch], at: int, rank: int) -> Iterator[Batch]:
    for step, batch in enumerate(batches):
        if step == at and rank == 1:
            batch.dense[2, 1] = float("inf")
        yield batch


def _stopped_by_loss(rank: int, world_size: int) -> tuple[str, int, list[str]]:
    settings, here = _settings(), runtime(rank, world_size)
    parts = distribute(settings, here)
    pipeline = GuardedPipeline(parts.model, parts.optimizer, here)
    shares = (share(global_batch(settings.schema, s, ROWS), rank, world_size) for s in range(6))
    batches = _poisoned(shares, 3, rank)
    done = 0
    try:
        while True:
            before = local({"model": parts.model.state_dict(), "optimizer": parts.optimizer.state()})
            pipeline.progress(batches)
            done += 1
    except ArithmeticError as error:
        after = local({"model": parts.model.state_dict(), "optimizer": parts.optimizer.state()})
        assert before and before.keys() == after.keys()
        pairs = {name: zip(before[name], after[name], strict=True) for name in before}
        return str(error), done, [n for n, parts in pairs.items() if not all(torch.equal(a[2], b[2]) for a, b in parts)]


def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_anything_changes():
    results = run_ranks(_stopped_by_loss, 2)
    assert [done for _, done, _ in results] == [3, 3]
    assert "nan" in results[1][0] or "inf" in results[1][0]
    assert [changed for *_, changed in results] == [[], []]


def _spoilt(folder: Path, value: float) -> Path:
    """200 rows, of which number 150 has a huge dense value that no policy forbids."""
    folder.mkdir()
    rows = table(200)
    d0 = rows.column("d0").to_numpy().copy()
    d0[150] = value
    pq.write_table(rows.set_column(1, "d0", pa.array(d0)), folder / "a.parquet", row_group_size=50)
    return folder


def _message(rank: int, world_size: int, run: dict[str, Any]) -> str:
    try:
        train.run(from_mapping(run))
    except TrainingStopped as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize(
    ("value", "what", "note"),
    [
        # finite in the file, infinite once it is divided by std
        (3e38, "loss", "no update was made"),
        # the loss is finite, the squares of the gradients are not
        (1e30, "gradient", "tables were updated; go on from the checkpoint"),
    ],
)
def test_the_message_says_the_step_the_rows_and_where_to_go_on(tmp_path, value, what, note):
    data = _spoilt(tmp_path / "data", value)
    sections = {"schema": {"dense": {"d0": {"std": 0.5}}}, "data": {"shuffle": False, "batch_size": 10}}
    run = values(data, tmp_path / "run", checkpoint={"every": 2}, **sections)
    one, two = run_ranks(_message, 2, run)
    assert one == two
    lines = one.splitlines()
    # rank 1 reads rows 100..199, ten a step: row 150 comes in step 6
    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert lines[0] == f"the {what} is not finite at step 6 ({note}); last good checkpoint: {last}"
    assert f"rank 1: {what} " in lines[2]
    assert lines[2].endswith("rank 1: " + f"{data}/a.parquet row group 3, rows 150..159")
    assert "lower optim" in lines[-1]
    assert [c.step for c in find(last.parent)] == [2, 4]


def test_without_a_checkpoint_the_message_says_so(tmp_path):
    data = _spoilt(tmp_path / "data", 3e38)
    schema = {"dense": {"d0": {"std": 0.5}}}
    (message,) = run_ranks(_message, 1, values(data, tmp_path / "run", schema=schema, data={"shuffle": False}))
    assert "at step 10 (no update was made); no checkpoint was written before it" in message


# Optimisers


def test_a_parameter_with_no_or_two_optimisers_is_refused():
    with pytest.raises(ValueError, match=r"a \(2 optimisers\), c \(0 optimisers\)$"):
        _check_owners(["a", "b", "c"], [{"a": 1, "b": 1}, {"a": 1}])


def _without_fused(rank: int, world_size: int) -> str:
    settings = _settings()
    parts = distribute(settings, runtime(rank, world_size))
    parts.model.fused_optimizer._optims.clear()
    with pytest.raises(ValueError, match="exactly one optimiser") as error:
        StepOptimizer(parts.model, settings.optim)
    return str(error.value)


def test_a_table_that_lost_its_fused_optimiser_is_refused():
    (message,) = run_ranks(_without_fused, 1)
    assert "main_user.weight (0 optimisers)" in message
    assert "main_hour.weight" not in message  # data-parallel: it has an ordinary one


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        (Schedule(), {0: 1.0, 999: 1.0}),
        (Schedule(warmup_steps=4), {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 99: 1.0}),
        (
            Schedule(decay="linear", decay_start=10, decay_steps=10),
            {9: 1.0, 10: 1.0, 15: 0.5, 19: 0.1, 20: 0.0, 99: 0.0},
        ),
        (Schedule(decay="linear", decay_start=0, decay_steps=4, floor=0.2), {0: 1.0, 1: 0.8, 2: 0.6, 4: 0.2, 9: 0.2}),
        (Schedule(decay="cosine", decay_start=2, decay_steps=6), {2: 1.0, 4: 0.75, 5: 0.5, 6: 0.25, 8: 0.0}),
        (Schedule(warmup_steps=4, decay="linear", decay_steps=4), {0: 0.25, 1: 0.5 * 0.75, 2: 0.75 * 0.5, 4: 0.0}),
    ],
)
def test_learning_rate_factors(schedule, factors):
    assert {step: schedule.factor(step) for step in factors} == pytest.approx(factors)


STEPS = 6
OPTIMS = [
    {"schedule": {"warmup_steps": 3, "decay": "linear", "decay_start": 3, "decay_steps": 2, "floor": 0.1}},
    {"schedule": {"decay": "linear", "decay_steps": 1}},  # only step 0 moves anything
    {"clip_norm": 0.02},
]


def _sharded(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    """Final parameters of a run with each of OPTIMS."""
    results = []
    for optim in OPTIMS:
        settings, here = _settings(**optim), runtime(rank, world_size)
        parts = distribute(settings, here)
        pipeline = GuardedPipeline(parts.model, parts.optimizer, here)
        batches = iter([share(global_batch(settings.schema, s, ROWS), rank, world_size) for s in range(STEPS)])
        for step in range(STEPS):
            parts.optimizer.set_step(step)
            pipeline.progress(batches)
        results.append(whole(parts.model.state_dict()))
    return results


def _unsharded(optim: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], list[float]]:
    """Initial and final parameters of plain torch on the whole batches, and each step's norm of the dense gradients."""
    settings = _settings(**optim)
    model, tables = build(settings, table_device="cpu")
    initialise(model.state_dict(), tables, settings.run.seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = {"tables": settings.optim.tables.lr, "dense": settings.optim.dense.lr}
    dense = [p for n, p in model.named_parameters() if ".embedding_bags." not in n]
    collection = model.embeddings.collection.parameters()
    optimizers = {
        "tables": torch.optim.Adagrad(collection, lr=rates["tables"], eps=settings.optim.tables.eps),
        "dense": torch.optim.SGD(dense, lr=rates["dense"]),
    }
    norms = []
    for step in range(STEPS):
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = rates[name] * settings.optim.schedule.factor(step)
            optimizer.zero_grad()
        model(global_batch(settings.schema, step, ROWS))[0].backward()
        norms.append(torch.nn.utils.clip_grad_norm_(dense, settings.optim.clip_norm or math.inf).item())
        for optimizer in optimizers.values():
            optimizer.step()
    return before, {name: p.detach().clone() for name, p in model.named_parameters()}, norms


@pytest.mark.parametrize("world_size", [1, 2])
def test_schedules_and_clipping_are_those_of_plain_torch(world_size):
    for optim, after in zip(OPTIMS, run_ranks(_sharded, world_size)[0], strict=True):
        before, expected, norms = _unsharded(optim)
        if "clip_norm" in optim:
            assert min(norms) > 2 * optim["clip_norm"], "clipping had nothing to do"
        for name, start in before.items():
            update, wanted = after[name] - start, expected[name] - start
            assert wanted.norm() > 0
            assert (update - wanted).norm() / wanted.norm() < 1e-4, f"{optim}: {name}"


# Stopping early, precision


@pytest.mark.parametrize("world_size", [1, 2])
def test_early_stopping_restores_and_keeps_the_best(tmp_path, world_size):
    data, validation = write(tmp_path / "train", 150), write(tmp_path / "validation", 300, seed=6)
    run = values(
        data,
        tmp_path / "run",
        data={"validation": str(validation)},
        optim={"tables": {"lr": 0.3}, "dense": {"lr": 0.05}},  # learns 150 rows by heart
        train={"epochs": 100, "eval_every": 4, "early_stopping": {"patience": 3}},
        checkpoint={"keep": 1},
    )
    result = run_ranks(train_all, world_size, [run])[0][0]
    evaluations = reports(tmp_path / "run", "validation")
    ne = [e["metrics"]["ne"] for e in evaluations]
    best = int(np.argmin(ne))
    assert result["best_step"] == evaluations[best]["step"]
    assert len(ne) == best + 1 + 3 and result["step"] == evaluations[-1]["step"] < 100 * 150 // 16 // world_size
    assert min(ne[best + 1 :]) > ne[best], "the last weights must be worse for this test to say anything"
    assert result["metrics"]["validation"] == evaluations[best]["metrics"]
    steps = [c.step for c in find(tmp_path / "run" / "checkpoints")]
    assert steps == [result["best_step"], result["step"]]


def _precisions(rank: int, world_size: int, run: dict[str, Any]) -> list[tuple]:
    results = []
    for precision in ("fp32", "bf16"):
        settings = from_mapping(merged(run, {"train": {"precision": precision}}))
        parts = distribute(settings, runtime(rank, world_size))
        batch = global_batch(settings.schema, 0, ROWS)
        loss, output = parts.model(batch)
        loss.backward()
        kinds = {p.dtype for p in parts.model.parameters()}
        results.append((loss.item(), loss.dtype, output.predictions.dtype, kinds))
    return results


def test_bf16_is_of_the_dense_part_only(tmp_path):
    (results,) = run_ranks(_precisions, 1, values("unused", tmp_path / "run"))
    (full, *kinds), (half, *half_kinds) = results
    assert kinds == half_kinds == [torch.float32, torch.float32, {torch.float32}]
    assert half != full and half == pytest.approx(full, rel=0.02)


def test_a_bf16_run_learns(tmp_path):
    data = write(tmp_path / "data", 600)
    run = values(data, tmp_path / "run", train={"precision": "bf16", "epochs": 8}, metrics={"window_rows": 600})
    ((result,), _) = run_ranks(train_all, 2, [run])
    assert result["metrics"]["train"]["auc"] > 0.65
    assert result["metrics"]["train"]["ne"] < 1


# Evaluation


def _evaluated(rank: int, world_size: int, run: dict[str, Any]) -> dict[str, float]:
    return evaluate.run(from_mapping(run))["metrics"]


@pytest.mark.parametrize(("sharding", "tolerance"), [("table_wise", 1e-12), ("row_wise", 1e-6)])
def test_evaluation_of_any_number_of_rows_is_that_of_one_rank(tmp_path, sharding, tolerance):
    """Row-wise, a bag is summed in parts on several ranks: then the logits themselves differ in their last digit."""
    data, test = write(tmp_path / "data", 300), write(tmp_path / "test", 587, row_group=61, seed=9)
    run = values(
        data,
        tmp_path / "run",
        data={"test": str(test), "eval_batch_size": 32},
        embeddings={"sharding": sharding},
        metrics={"by": ["domain"], "grouped_auc": ["user"]},
    )
    run_ranks(train_all, 1, [run])
    one, *others = [run_ranks(_evaluated, n, run) for n in (1, 2, 3)]
    assert len(one[0]) == 5 * 4 and not any(math.isnan(v) for v in one[0].values())
    for metrics in (m for ranks in others for m in ranks):
        assert metrics == pytest.approx(one[0], rel=tolerance, abs=0)
