"""What a run folder remembers: the best checkpoint, the config, the reports; and what a continued run may change."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec import train
from dist_rec.config import from_mapping, load
from dist_rec.data.parquet import decode
from dist_rec.settings import ConfigError
from dist_rec.training.checkpoint import CheckpointError, find
from dist_rec.training.compatible import check_same_model
from tests import catalogues
from tests.ranks import run_ranks
from tests.runs import merged, reports, train_all, values, write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 rows."""
    return write(tmp_path_factory.mktemp("data"), 300)


def _attempts(rank: int, world_size: int, runs: list[dict[str, Any]]) -> list[str]:
    """What each run ends with: "trained", or the message of its refusal."""
    said = []
    for run in runs:
        try:
            train_all(rank, world_size, [run])
            said.append("trained")
        except CheckpointError as error:
            said.append(str(error))
    return said


def _stopping(data: Path, folder: Path, /, **sections: Any) -> dict[str, Any]:
    # tables that run away: every evaluation is worse than the one before by NE
    base = {
        "data": {"validation": str(data)},
        "train": {"epochs": 100, "eval_every": 4, "early_stopping": {"patience": 2}},
        "optim": {"tables": {"lr": 3.0}},
    }
    return values(data, folder, **merged(base, sections))


def test_the_best_step_is_in_the_newest_checkpoint_also_when_it_is_the_last(data, tmp_path):
    stop = {"metric": "auc", "patience": 50}
    run = values(
        data,
        tmp_path / "run",
        data={"validation": str(data)},
        train={"steps": 10, "epochs": 100, "eval_every": 4, "early_stopping": stop},
        checkpoint={"every": 5},
    )
    (result,) = run_ranks(train_all, 1, [run])[0]
    found = {r["step"]: r["metrics"]["auc"] for r in reports(tmp_path / "run", "validation")}
    assert list(found) == [4, 8, 10]
    assert result["best_step"] == max(found, key=found.__getitem__) == 10
    newest = find(tmp_path / "run" / "checkpoints")[-1]
    assert newest.step == newest.meta["progress"]["best_step"] == 10


def test_a_higher_auc_and_a_lower_ne_are_better(data, tmp_path):
    for metric, best in (("auc", max), ("log_loss", min)):
        folder = tmp_path / metric
        run = _stopping(data, folder, train={"early_stopping": {"metric": metric}})
        (result,) = run_ranks(train_all, 1, [run])[0]
        found = {r["step"]: r["metrics"][metric] for r in reports(folder, "validation")}
        assert len(found) > 1
        assert result["best_step"] == best(found, key=found.__getitem__)


@pytest.mark.parametrize("metric", ["nee", "calibration", "gauc/user"])
def test_a_metric_that_cannot_judge_is_refused_before_anything_starts(data, tmp_path, metric):
    with pytest.raises(
        ConfigError, match=f"train.early_stopping.metric: is '{metric}'; choose one of ne, log_loss, auc"
    ):
        from_mapping(_stopping(data, tmp_path, train={"early_stopping": {"metric": metric}}))


def test_without_early_stopping_a_resumed_run_keeps_its_last_weights(data, tmp_path):
    folder = tmp_path / "run"
    stopped = _stopping(data, folder)
    (first,) = run_ranks(train_all, 1, [stopped])[0]
    assert first["best_step"] < first["step"]
    on = merged(stopped, {"train": {"early_stopping": None, "steps": first["step"] + 4}})
    (second,) = run_ranks(train_all, 1, [on])[0]
    assert second["best_step"] is None
    last = reports(folder, "validation")[-1]
    assert last["step"] == second["step"] == first["step"] + 4
    assert second["metrics"]["validation"] == last["metrics"]


def test_a_best_value_of_another_metric_is_forgotten(data, tmp_path):
    stopped = _stopping(data, tmp_path / "run")
    (first,) = run_ranks(train_all, 1, [stopped])[0]
    on = merged(stopped, {"train": {"early_stopping": {"metric": "auc"}, "steps": first["step"] + 4}})
    (second,) = run_ranks(train_all, 1, [on])[0]
    assert second["best_step"] == first["step"] + 4  # the first that was judged by AUC


def test_what_changes_the_meaning_of_parameters_is_refused_and_the_folder_kept(data, tmp_path):
    domain = {"schema": {"groups": {"domain": {"num_ids": 3}}}}
    run = values(data, tmp_path / "run", train={"steps": 4}, **domain)
    on = merged(run, {"train": {"steps": 6}})
    refused = [
        merged(on, {"schema": {"groups": {"domain": {"column": "item", "num_ids": 101}}}}),
        merged(on, {"embeddings": {"layout": "wide"}}),
        merged(on, {"model": {"dim": 16}}),
        merged(on, {"embeddings": {"pooling": "mean"}, "schema": {"dense": {"d0": {"mean": 5.0}}}}),
        merged(on, {"optim": {"tables": {"name": "sgd"}}}),
        merged(on, {"schema": {"groups": {"domain": {"out_of_range": "reserved"}}}}),
        merged(on, {"schema": {"sparse": {"item": {"on_null": "reserved"}}}}),
    ]
    columns = {"sparse": {"user": {"out_of_range": "hash"}}, "groups": {"user": {"column": "item"}}}
    allowed = merged(on, {"optim": {"tables": {"lr": 0.5}}, "schema": columns})
    run_ranks(train_all, 1, [run])
    before = (tmp_path / "run" / "config.yaml").read_text()
    said = run_ranks(_attempts, 1, refused)[0]
    groups, layout, *said_of = said
    assert "schema.groups.domain.column: domain -> item" in groups and "domain.num_ids: 3 -> 101" in groups
    assert "embeddings.layout: separate -> wide" in layout
    assert "model.dim: 8 -> 16" in said_of[0]
    assert "schema.dense.d0.mean: 0.0 -> 5.0" in said_of[1] and "embeddings.pooling: sum -> mean" in said_of[1]
    assert "optim.tables.name: rowwise_adagrad -> sgd" in said_of[2]
    for text, column in zip(said_of[3:], ("groups.domain", "sparse.item"), strict=True):
        assert f"schema.{column} (out_of_range or on_null: reserved): False -> True" in text
    assert all("another run.dir" in text for text in said)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    assert run_ranks(_attempts, 1, [allowed])[0] == ["trained"]


def test_weights_are_used_by_a_config_that_treats_bad_values_and_rows_otherwise():
    """But not by one that would read another thing into them, though it has as many of them."""
    saved = {
        "schema": {
            "items": {"feature": "item", "on_missing": "error"},
            "sparse": {"item": {"num_ids": 9, "out_of_range": "error"}, "user": {"num_ids": 9}},
            "weight": None,
        },
        "embeddings": {"inner_dim": 8},
        "optim": {"tables": {"name": "adam"}},
        "auxiliary": {"covariance": {"alpha": 1.0}},
    }
    sparse = {"item": {"out_of_range": "hash"}}
    schema = {"items": {"on_missing": "empty"}, "sparse": sparse, "weight": {"column": "w"}}
    other = merged(saved, {"schema": schema, "optim": {"tables": {"name": "sgd"}}})
    check_same_model(saved, {**other, "auxiliary": {}})
    turned = {**saved["schema"], "sparse": dict(reversed(saved["schema"]["sparse"].items()))}
    for changed, key in (
        ({"schema": {"items": {"feature": "user"}}}, "schema.items.feature: item -> user"),
        ({"embeddings": {"inner_dim": None}}, "embeddings.inner_dim: 8 -> nothing"),
    ):
        with pytest.raises(CheckpointError, match=key):
            check_same_model(saved, merged(saved, changed))
    with pytest.raises(CheckpointError, match=r"schema.sparse \(order\)"):
        check_same_model(saved, {**saved, "schema": turned})


def test_an_order_of_columns_that_would_swap_their_tables_is_refused(data, tmp_path):
    run = values(data, tmp_path / "run", train={"steps": 4})
    turned = merged(run, {})
    turned["schema"] = {**run["schema"], "sparse": dict(reversed(run["schema"]["sparse"].items()))}
    said = run_ranks(_attempts, 1, [run, merged(turned, {"train": {"steps": 6}})])[0]
    assert said[0] == "trained" and "schema.sparse (order)" in said[1]


def test_if_every_checkpoint_is_damaged_nothing_starts_anew(data, tmp_path):
    run = values(data, tmp_path / "run", train={"steps": 4})
    run_ranks(train_all, 1, [run])
    (only,) = find(tmp_path / "run" / "checkpoints")
    (only.path / "rank-0.pt").unlink()
    kept = (tmp_path / "run" / "metrics.jsonl").read_text()
    for said in run_ranks(_attempts, 2, [run]):
        assert "no checkpoint is complete" in said[0] and "rank-0.pt is missing" in said[0]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == kept


def _apart(rank: int, world_size: int, run: dict[str, Any]) -> str:
    run["run"]["dir"] += str(rank)
    return _attempts(rank, world_size, [run])[0]


def test_ranks_that_do_not_share_the_run_folder_are_told_at_the_start(data, tmp_path):
    for said in run_ranks(_apart, 2, values(data, tmp_path / "run", train={"steps": 4})):
        # both paths are on this machine: what rank 0 made is there, but the folder is not the same
        assert "put run.dir on storage that all nodes share" in said
    assert not list(tmp_path.glob("run*/checkpoints/step-*"))


def test_running_a_finished_run_again_adds_no_report(data, tmp_path):
    folder = tmp_path / "run"
    run = _stopping(data, folder, data={"test": str(data)})
    (first,) = run_ranks(train_all, 1, [run])[0]
    once = (folder / "metrics.jsonl").read_text()
    (second,) = run_ranks(train_all, 1, [run])[0]
    assert (folder / "metrics.jsonl").read_text() == once
    assert {k: second[k] for k in ("metrics", "step", "best_step", "examples")} == {
        k: first[k] for k in ("metrics", "step", "best_step", "examples")
    }
    progress = find(folder / "checkpoints")[-1].meta["progress"]
    assert progress["evaluations_since_best"] == 2


def test_what_a_folder_says_of_its_settings_is_what_was_trained(data, tmp_path, capfd):
    folder = tmp_path / "run"
    run = values(data, folder, train={"steps": 4}, optim={"dense": {"lr": 0.01}})
    (first,) = run_ranks(train_all, 1, [run])[0]
    kept = {name: (folder / name).read_text() for name in ("config.yaml", "result.json", "metrics.jsonl")}
    assert "were not applied" not in capfd.readouterr().out
    # nothing is left to train
    other = merged(run, {"optim": {"dense": {"lr": 0.5}}, "data": {"test": str(data)}})
    assert run_ranks(train_all, 2, [other]) == [[json.loads(kept["result.json"])]] * 2
    said = capfd.readouterr().out
    assert "nothing to train: train.steps and train.epochs end at step 4" in said and "were not applied" in said
    assert {name: (folder / name).read_text() for name in kept} == kept
    # the same, where the run was stopped between its last checkpoint and its result
    (folder / "result.json").unlink()
    (second,) = run_ranks(train_all, 1, [merged(run, {"optim": {"dense": {"lr": 0.5}}})])[0]
    assert second["metrics"] == first["metrics"] and (folder / "result.json").exists()
    assert (folder / "config.yaml").read_text() == kept["config.yaml"]
    # something is: what the first steps were trained by is kept beside what the others are
    assert not list(folder.glob("config-*"))
    run_ranks(train_all, 1, [merged(other, {"train": {"steps": 6}})])
    assert (folder / "config-4.yaml").read_text() == kept["config.yaml"]
    assert load(str(folder / "config.yaml")).optim.dense.lr == 0.5


def test_losses_are_reported_as_means_and_survive_a_resume(data, tmp_path):
    whole, halves = (values(data, tmp_path / name, train={"steps": 20, "epochs": 9}) for name in ("whole", "halves"))
    # step 8 lies between two reports
    run_ranks(train_all, 2, [whole, merged(halves, {"train": {"steps": 8}}), halves])
    one, two = (
        {r["step"]: r["metrics"]["loss/bce"] for r in reports(tmp_path / n, "train")} for n in ("whole", "halves")
    )
    assert list(one) == [5, 10, 15, 20]
    assert 0.5 < one[5] < 1.0
    assert two[15] == one[15] and two[20] == one[20]


def test_time_and_policies_are_of_the_whole_run(data, tmp_path):
    narrow, shuffle_rows = {"sparse": {"user": {"num_ids": 100, "out_of_range": "hash"}}}, 32
    paths = {"validation": str(data), "test": str(data), "shuffle_rows": shuffle_rows}
    run = values(data, tmp_path / "run", schema=narrow, data=paths)
    # step 3 is in the middle of a block, which is two steps
    results = [run_ranks(train_all, 2, [merged(run, {"train": {"steps": steps}})])[0][0] for steps in (3, 100)]
    assert 0 < results[0]["train_seconds"] < results[0]["wall_seconds"] < results[1]["wall_seconds"]
    counts = results[1]["data_policies"]
    expected = sum(user >= 100 for user in _users(data))
    assert counts["validation"] == counts["test"] == {"user.out_of_range=hash": expected}
    # each rank counts the rest of its block again, and the block that two batches under way had begun
    most = expected + 2 * 2 * shuffle_rows
    assert expected <= counts["train"]["user.out_of_range=hash"] <= most < 2 * expected
    assert json.loads((tmp_path / "run" / "result.json").read_text())["data_policies"] == counts


def _users(data: Path) -> list[int]:
    return pq.read_table(data)["user"].to_pylist()


def test_a_second_run_in_a_folder_in_use_is_refused(data, tmp_path):
    run = values(data, tmp_path / "run", train={"steps": 4})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with open(tmp_path / "run" / "checkpoints" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert all("is in use by another run" in said[0] for said in run_ranks(_attempts, 2, [run]))
    assert run_ranks(_attempts, 2, [run])[0] == ["trained"]


def test_another_item_table_is_refused_and_the_same_one_elsewhere_is_not(tmp_path):
    """Items are drawn by their row in it, which the position in the training data does not say."""
    data = catalogues.write(tmp_path / "data")
    moved, grown = tmp_path / "moved", tmp_path / "grown"
    for folder in (moved, grown):
        shutil.copytree(data / "items", folder)
    row = pa.table({"id": [catalogues.ABSENT[0]], "tags": [[1]], "brand": [2], "price": pa.array([1.0], pa.float32())})
    items = pq.read_table(grown / "b.parquet")
    pq.write_table(pa.concat_tables([items, row.cast(items.schema)]), grown / "b.parquet")

    def run(steps: int, table: Path) -> dict[str, Any]:
        rest = {"train": {"steps": steps}, "auxiliary": {"spread_out": {}}}
        return catalogues.values(data, tmp_path / "run", **merged(rest, {"data": {"items": str(table)}}))

    first, refused, again = run_ranks(_attempts, 1, [run(4, data / "items"), run(8, grown), run(8, moved)])[0]
    assert (first, again) == ("trained", "trained")
    assert "data.items: the item table changed since the checkpoint (rows 95 -> 96" in refused


def _without_locks(rank: int, world_size: int, run: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What the run ends with, and its warnings, on a file system without locks."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]

    def refuse(file: Any, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        patch.setattr(logging.getLogger("dist_rec.train"), "handlers", [handler])
        return _attempts(rank, world_size, [run]), said


def test_a_file_system_without_locks_is_warned_of_and_trained_on(data, tmp_path):
    first, second = run_ranks(_without_locks, 2, values(data, tmp_path / "run", train={"steps": 4}))
    assert first[0] == second[0] == ["trained"]
    (warning,) = first[1]
    assert "no lock here (" in warning and "two runs in this folder would not be noticed" in warning
    assert second[1] == []


def _slow_disk(rank: int, world_size: int, run: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The result of a run in which rank 1 reads slowly, and how many seconds this rank waited for data."""

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.1)
        return decode(*args, **kwargs)

    config = from_mapping(run)
    with pytest.MonkeyPatch.context() as patch, train.process(config.run) as here:
        if rank == 1:
            patch.setattr("dist_rec.data.loader.decode", slowly)
        training = train._Training(config, here)
        return training.run(), training.loader.wait_seconds


def test_the_wait_for_data_is_that_of_the_rank_that_waits(tmp_path):
    data = write(tmp_path / "data", 300, row_group=10)
    run = values(data, tmp_path / "run", data={"shuffle": False}, report={"every": 100})
    (first, quick), (second, slow) = run_ranks(_slow_disk, 2, run)
    assert slow > quick
    assert first["train_seconds"] == second["train_seconds"]
    share = min(slow / first["train_seconds"], 1)
    assert first["data_wait_share"] == second["data_wait_share"] == pytest.approx(share, rel=1e-6)
    (report,) = reports(tmp_path / "run", "train")
    assert report["data_wait_share"] == pytest.approx(share, rel=1e-6)
    assert find(tmp_path / "run" / "checkpoints")[-1].meta["progress"]["wait_seconds"] > quick
