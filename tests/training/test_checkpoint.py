"""A checkpoint goes on any number of ranks: weights and optimiser states follow, or the refusal says what to do."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_rec import evaluate, train
from dist_rec.config import from_mapping
from dist_rec.embeddings.sharding import sharding_types
from dist_rec.recommender import distribute
from dist_rec.training.checkpoint import Checkpointer, CheckpointError, check_reshardable, find
from tests.ranks import run_ranks
from tests.runs import merged, reports, rows_trained, train_all, values, write
from tests.sharded import runtime, whole

ROWS = 300
MIXED = {"user": "row_wise", "item": "table_wise", "tags": "data_parallel"}
MIXED_2 = {"user": "table_row_wise", "item": "row_wise", "tags": "data_parallel"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 rows."""
    return write(tmp_path_factory.mktemp("data"), ROWS)


def _run(
    data: Path, folder: Path, kinds: dict[str, str], tables: str, dense: str, /, **sections: Any
) -> dict[str, Any]:
    optim = {"tables": {"name": tables, "lr": 0.1}, "dense": {"name": dense, "lr": 0.01}}
    sharding = {t: {"sharding": kind} for t, kind in kinds.items()}
    return values(data, folder, **merged({"embeddings": {"tables": sharding}, "optim": optim}, sections))


def _state(parts: Any) -> dict[str, torch.Tensor]:
    return whole({"model": parts.model.state_dict(), "optimizer": parts.optimizer.state()})


def _trained(rank: int, world_size: int, runs: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """Trains each run to its end; what was in memory then, in whole tensors."""
    results = []
    for run in runs:
        config = from_mapping(run)
        with train.process(config.run) as here:
            training = train._Training(config, here)
            training.run()
            results.append(_state(training.parts))
    return results


def _loaded(rank: int, world_size: int, runs: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
    """What each run's newest checkpoint becomes in memory here; no step is made."""
    results = []
    for run in runs:
        config, here = from_mapping(run), runtime(rank, world_size)
        checkpointer = Checkpointer(Path(config.run.dir) / "checkpoints", config.checkpoint, here)
        checkpoint = checkpointer.latest()
        assert checkpoint is not None and checkpoint.step == 7
        parts = distribute(config, here, checkpoint.meta["plan"])
        checkpointer.load(checkpoint, parts.model, parts.optimizer)
        results.append(_state(parts))
    return results


def test_weights_and_optimiser_states_follow_to_any_number_of_ranks(data, tmp_path):
    """Saved on two ranks; the tensors that one, two and three ranks hold after loading are those that were saved."""
    cases = [
        (MIXED, "rowwise_adagrad", "adamw"),
        (MIXED_2, "rowwise_adagrad", "adagrad"),
        (MIXED, "adagrad", "sgd"),
        (MIXED_2, "sgd", "adamw"),
        (dict.fromkeys(MIXED, "column_wise"), "adagrad", "adamw"),
        (MIXED, "rowwise_adagrad", "adamw", 16),  # two layers: both are kept, and reshard
        (MIXED_2, "adagrad", "adagrad", 16),
    ]
    runs = [
        _run(data, tmp_path / str(i), *case[:3], train={"steps": 7}, sharding={"min_columns": 4},
             embeddings={"inner_dim": case[3] if len(case) > 3 else None})
        for i, case in enumerate(cases)
    ]  # fmt: skip
    saved = run_ranks(_trained, 2, runs)
    # loaded with rows where tables were, and the other way round
    moved = [
        {**run, "embeddings": runs[other]["embeddings"]} for run, other in zip(runs, (1, 0, 1, 0, 4, 6, 5), strict=True)
    ]
    for world_size in (1, 2, 3):
        for loaded in run_ranks(_loaded, world_size, moved):
            for case, before, after in zip(cases, saved[0], loaded, strict=True):
                assert before.keys() == after.keys(), case
                for name, tensor in before.items():
                    assert torch.equal(after[name], tensor), f"{case} on {world_size} ranks: {name}"
    states = [name for name in saved[0][0] if name.startswith("optimizer/")]
    assert any("main_user" in name for name in states) and any("main_tags" in name for name in states)
    assert any("exp_avg_sq" in name for name in states)
    second = [name for name in saved[0][5] if "projections.main_" in name]
    assert len([name for name in second if name.startswith("model/")]) == len(MIXED)
    assert any("exp_avg_sq" in name for name in second), "with the dense optimiser's state"
    tables = [name for name in saved[0][3] if name.startswith("optimizer/") and "embedding_bags" in name]
    assert not tables, "plain SGD has no state"


def test_a_table_may_not_move_between_replicated_split_by_columns_and_by_rows(data, tmp_path):
    run = _run(data, tmp_path / "run", MIXED, "adagrad", "sgd", train={"steps": 2})
    run_ranks(train_all, 1, [run])
    for table, to in (("tags", "row_wise"), ("user", "data_parallel"), ("item", "column_wise")):
        other = merged(run, {"embeddings": {"tables": {table: {"sharding": to}}}, "train": {"steps": 4}})
        (message,) = run_ranks(_refused, 1, other)
        assert f"main_{table}: {MIXED[table]} -> {to}" in message
        assert f"embeddings.tables.main_{table}.sharding={MIXED[table]}" in message
    # the fix that the last message names, as an override
    fixed = merged(
        other, {"embeddings": {"tables": {"item": {"sharding": "auto"}, "main_item": {"sharding": "table_wise"}}}}
    )
    run_ranks(train_all, 1, [fixed])
    assert [c.step for c in find(tmp_path / "run" / "checkpoints")] == [2, 4]


def _refused(rank: int, world_size: int, run: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError, match="cannot follow their change of sharding") as error:
        train.run(from_mapping(run))
    return str(error.value)


def test_plain_sgd_moves_anywhere(data, tmp_path):
    run = _run(data, tmp_path / "run", MIXED, "sgd", "sgd", train={"steps": 7})
    saved = run_ranks(_trained, 1, [run])[0][0]
    kinds = {"user": "data_parallel", "item": "column_wise", "tags": "table_wise"}
    other = merged(run, {"embeddings": {"tables": {t: {"sharding": k} for t, k in kinds.items()}}})
    loaded = run_ranks(_loaded, 2, [other])[0][0]
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    run_ranks(train_all, 2, [merged(other, {"train": {"steps": 9}})])
    assert find(tmp_path / "run" / "checkpoints")[-1].step == 9


def test_only_moves_between_the_three_groups_are_refused():
    rows = ["row_wise", "table_wise", "table_row_wise"]
    for one in rows:
        for other in rows:
            check_reshardable({"t": one}, {"t": other}, "adagrad")
    check_reshardable({"t": "data_parallel", "gone": "row_wise"}, {"t": "data_parallel", "new": "row_wise"}, "adagrad")
    check_reshardable({"t": "column_wise"}, {"t": "row_wise"}, "sgd")
    with pytest.raises(CheckpointError):
        check_reshardable({"t": "column_wise"}, {"t": "row_wise"}, "adagrad")


@pytest.mark.parametrize("ranks", [(1, 2), (2, 3), (3, 1)])
def test_a_run_of_automatic_plans_goes_on_on_another_number_of_ranks(data, tmp_path, ranks):
    sections = {"data": {"batch_size": 8}, "metrics": {"grouped_auc": ["row"], "window_rows": 10 * ROWS}}
    first = _run(data, tmp_path / "run", {}, "rowwise_adagrad", "adagrad", train={"steps": 7}, **sections)
    run_ranks(train_all, ranks[0], [first])
    plan = find(tmp_path / "run" / "checkpoints")[-1].meta["plan"]
    run_ranks(train_all, ranks[1], [merged(first, {"train": {"steps": None}})])
    last = find(tmp_path / "run" / "checkpoints")[-1]
    assert set(rows_trained(last).items()) == {(row, 1) for row in range(ROWS)}
    assert last.meta["plan"].keys() == plan.keys()
    for table, kind in plan.items():
        assert (last.meta["plan"][table] == "data_parallel") == (kind == "data_parallel")


def test_another_model_is_refused_with_its_reason(data, tmp_path):
    run = _run(data, tmp_path / "run", MIXED, "adagrad", "sgd", train={"steps": 2})
    run_ranks(train_all, 1, [run])
    wider = merged(run, {"model": {"dim": 16}, "train": {"steps": 4}})
    (message,) = run_ranks(_does_not_fit, 1, wider)
    assert str(tmp_path / "run" / "checkpoints" / "step-00000002") in message


def _does_not_fit(rank: int, world_size: int, run: dict[str, Any]) -> str:
    config, here = from_mapping(run), runtime(rank, world_size)
    checkpointer = Checkpointer(Path(config.run.dir) / "checkpoints", config.checkpoint, here)
    checkpoint = checkpointer.latest()
    assert checkpoint is not None
    with pytest.raises(CheckpointError, match="does not fit this model") as error:
        checkpointer.load(checkpoint, distribute(config, here).model, None)
    return str(error.value)


def _evaluated_too_late(rank: int, world_size: int, run: dict[str, Any], moment: str, removed: str) -> str:
    """Evaluates a run whose checkpoint begins to be removed just before the function `moment` is called."""
    config = from_mapping(run)
    (only,) = find(Path(config.run.dir) / "checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        module, name = moment.rsplit(".", 1)
        original = getattr(importlib.import_module(module), name)

        def late(*args: Any, **kwargs: Any) -> Any:
            if rank == 0:
                (only.path / removed).unlink()  # a folder is removed file by file
            dist.barrier()
            return original(*args, **kwargs)

        patch.setattr(moment, late)
        with pytest.raises(CheckpointError) as error:
            evaluate.run(config)
    return str(error.value)


@pytest.mark.parametrize(
    ("moment", "removed"),
    [("dist_rec.job.distribute", ".metadata"), ("torch.distributed.checkpoint.load", "__1_0.distcp")],
)
def test_a_checkpoint_that_is_removed_while_it_is_read_is_said_to_be(data, tmp_path, moment, removed):
    run = _run(data, tmp_path / "run", MIXED, "adagrad", "sgd", train={"steps": 2}, data={"test": str(data)})
    run_ranks(train_all, 2, [run])
    for said in run_ranks(_evaluated_too_late, 2, run, moment, removed, timeout=100):
        assert "step-00000002 was removed while it was read; raise checkpoint.keep" in said
        assert "evaluate.step" in said


def test_resume_never_refuses_a_folder_with_checkpoints(data, tmp_path):
    run = _run(data, tmp_path / "run", MIXED, "adagrad", "sgd", train={"steps": 2}, checkpoint={"resume": "never"})
    run_ranks(train_all, 1, [run])
    before = reports(tmp_path / "run")
    (message,) = run_ranks(_never, 1, run)
    assert "checkpoints up to step 2" in message and "another run.dir" in message
    assert reports(tmp_path / "run") == before


def _never(rank: int, world_size: int, run: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        train.run(from_mapping(run))
    return str(error.value)


def _plans(rank: int, world_size: int, run: dict[str, Any], saved: dict[str, str]) -> dict[str, str]:
    return sharding_types(distribute(from_mapping(run), runtime(rank, world_size), saved).plan)


def test_an_automatic_plan_keeps_what_its_checkpoint_replicates(data, tmp_path):
    run = _run(data, tmp_path / "run", {}, "adagrad", "sgd")
    for kind in ("data_parallel", "row_wise"):
        plan = run_ranks(_plans, 2, run, dict.fromkeys(["main_user", "main_item", "main_tags"], kind))[0]
        assert {k == "data_parallel" for k in plan.values()} == {kind == "data_parallel"}


def test_resume_on_three_ranks_is_bit_identical(data, tmp_path):
    """Sums over three ranks depend on their order, which must be the same in the first step after a resume."""
    kinds = {"user": "row_wise", "item": "data_parallel", "tags": "data_parallel"}
    sections = {"data": {"batch_size": 8}, "model": {"dropout": 0.2}}
    names = {"whole": [12], "halves": [6, 12]}
    runs = {n: [_run(data, tmp_path / n, kinds, "adagrad", "adamw", train={"steps": s}, **sections) for s in steps]
            for n, steps in names.items()}  # fmt: skip
    run_ranks(train_all, 3, [run for half in runs.values() for run in half])
    whole_, halves = (find(tmp_path / n / "checkpoints")[-1] for n in names)
    assert whole_.step == halves.step == 12
    for path in whole_.path.glob("*.distcp"):
        assert path.read_bytes() == (halves.path / path.name).read_bytes()
