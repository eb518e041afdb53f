"""One GPU trains as the CPU does, and as itself after a resume, with every optimiser and kernel.

CPU and CUDA add in different orders, so what both compute is compared to a tolerance. Two runs on the same GPU are
compared bit for bit: FBGEMM adds the gradients of one id in a fixed order as long as fewer than 1,024 of them meet in a
batch, which holds here. (Above that it adds with atomics, unless torch.use_deterministic_algorithms is on.)
"""

from __future__ import annotations

import socket

import pytest
import torch

from dist_rec import evaluate, train
from dist_rec.config import from_mapping
from dist_rec.embeddings.sharding import PlanError
from dist_rec.training.trainer import TrainingStopped
from tests.gpu.jobs import STEPS, losses, mapping, run, state, update_error, weights, write_data

MIXED = {"user": "row_wise", "item": "table_wise", "tags": "column_wise", "hour": "data_parallel"}
BY_ROW = {"user": "row_wise", "item": "table_row_wise", "tags": "row_wise", "hour": "data_parallel"}
DEVICES = ("cpu", "cuda")


def _tables(kinds):
    return {table: {"sharding": kind} for table, kind in kinds.items()}


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize(
    ("optimizer", "kinds"), [("rowwise_adagrad", BY_ROW), ("adagrad", MIXED), ("sgd", MIXED), ("sgd", BY_ROW)]
)
def test_losses_and_updates_equal_those_on_cpu(data, tmp_path, optimizer, kinds, pooling):
    for device in DEVICES:
        run(
            data,
            tmp_path / device,
            device,
            embeddings__tables=_tables(kinds),
            embeddings__pooling=pooling,
            sharding__min_columns=4,
            optim__tables={"name": optimizer, "lr": 0.05},
            optim__dense={"name": "sgd", "lr": 0.05},
            checkpoint__every=1,
        )
    on_cpu, on_cuda = (losses(tmp_path / device) for device in DEVICES)
    assert len(on_cpu) == STEPS
    assert on_cuda == pytest.approx(on_cpu, abs=1e-5)
    for name, error in update_error(tmp_path / "cuda", tmp_path / "cpu").items():
        assert error < 1e-4, f"the update of {name} is off by {error:.1e}"


@pytest.mark.parametrize("kernel", ["fused_uvm", "fused_uvm_caching"])
def test_tables_in_host_memory_train_as_those_on_the_gpu(data, tmp_path, kernel):
    for name in ("fused", kernel):
        run(data, tmp_path / name, "cuda", embeddings__kernel=name, checkpoint__every=1, train__eval_every=15)
    assert losses(tmp_path / kernel) == pytest.approx(losses(tmp_path / "fused"), abs=1e-6)
    for name, error in update_error(tmp_path / kernel, tmp_path / "fused").items():
        assert error < 1e-5, f"the update of {name} is off by {error:.1e}"


def test_a_cached_table_shows_the_weights_that_were_loaded(data, tmp_path):
    """Early stopping loads earlier weights under a cache that holds later ones."""
    changes = {
        "embeddings__kernel": "fused_uvm_caching",
        "train__eval_every": 4,
        "train__early_stopping": {"min_delta": 9.0, "patience": 3},  # nothing gains so much: the first is the best
    }
    result = run(data, tmp_path / "run", "cuda", **changes)
    assert (result["best_step"], result["step"]) == (4, 16)
    again = evaluate.run(from_mapping(mapping(data, tmp_path / "run", "cuda", **changes, evaluate__split="validation")))
    assert again["step"] == result["best_step"]
    assert result["metrics"]["validation"] == pytest.approx(again["metrics"], abs=1e-6)


def test_adam_of_tables_equals_torch(tmp_path):
    """FBGEMM's Adam moves only the rows of the batch, so every row is in every batch here."""
    data = write_data(tmp_path / "data", every_id_in_every_batch=True)
    for kind in ("table_wise", "data_parallel"):
        run(
            data,
            tmp_path / kind,
            "cuda",
            data__shuffle=False,
            embeddings__sharding=kind,
            optim__tables={"name": "adam", "lr": 0.01},
            checkpoint__every=1,
        )
    assert losses(tmp_path / "table_wise") == pytest.approx(losses(tmp_path / "data_parallel"), abs=1e-5)
    for name, error in update_error(tmp_path / "table_wise", tmp_path / "data_parallel").items():
        assert error < 1e-3, f"the update of {name} is off by {error:.1e}"


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_evaluation_does_not_change_training(data, tmp_path, optimizer):
    for name, every in (("often", 3), ("never", None)):
        run(data, tmp_path / name, "cuda", optim__tables={"name": optimizer, "lr": 0.02}, train__eval_every=every)
    often, never = (weights(tmp_path / name) for name in ("often", "never"))
    assert [name for name in never if not torch.equal(often[name], never[name])] == []


@pytest.mark.parametrize("kernel", ["fused", "fused_uvm_caching"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adam"])
def test_resumed_is_bit_identical_to_uninterrupted(data, tmp_path, optimizer, kernel):
    model = {"name": "dlrm", "dim": 8, "bottom": [32], "top": [32, 16], "dropout": 0.2}
    for folder, steps in (("whole", STEPS), ("halves", STEPS // 2), ("halves", STEPS)):
        values = mapping(
            data,
            tmp_path / folder,
            "cuda",
            embeddings__kernel=kernel,
            optim__tables={"name": optimizer, "lr": 0.02},
            optim__dense={"name": "adamw", "lr": 0.01},
            train__steps=steps,
            train__eval_every=7,
        )
        train.run(from_mapping(values | {"model": model}))
    whole, halves = (state(tmp_path / name) for name in ("whole", "halves"))
    assert set(whole) == set(halves)
    assert [name for name in whole if not torch.equal(whole[name], halves[name])] == []
    assert losses(tmp_path / "whole") == losses(tmp_path / "halves")


def test_a_run_of_the_cpu_goes_on_and_evaluates_on_the_gpu(data, tmp_path):
    changes = {"embeddings__tables": _tables(BY_ROW), "checkpoint__every": 1}
    run(data, tmp_path / "cpu", "cpu", **changes)
    run(data, tmp_path / "both", "cpu", **changes, train__steps=STEPS // 2)
    run(data, tmp_path / "both", "cuda", **changes)
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "cpu"), abs=1e-5)
    for name, error in update_error(tmp_path / "both", tmp_path / "cpu").items():
        assert error < 1e-4, f"the update of {name} is off by {error:.1e}"
    # and a checkpoint of the GPU evaluates to the same on both
    results = []
    for device in DEVICES:
        values = mapping(data, tmp_path / "both", device, **changes, evaluate__split="validation")
        results.append(evaluate.run(from_mapping(values))["metrics"])
    assert results[0] == pytest.approx(results[1], abs=1e-5)


def test_bf16_learns_as_fp32_does(data, tmp_path):
    results = {}
    for precision in ("fp32", "bf16"):
        result = run(data, tmp_path / precision, "cuda", train__precision=precision, train__steps=5 * STEPS)
        results[precision] = result["metrics"]["validation"]
    assert results["fp32"]["auc"] > 0.7
    assert results["bf16"]["auc"] == pytest.approx(results["fp32"]["auc"], abs=0.01)
    assert results["bf16"]["log_loss"] == pytest.approx(results["fp32"]["log_loss"], abs=0.01)
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32"), "autocast was not on"


def test_a_loss_that_is_not_finite_stops_before_the_tables_change(tmp_path):
    data = write_data(tmp_path / "data", broken_row=70 * 10)
    with pytest.raises(TrainingStopped, match=r"loss is not finite at step 11 \(no update was made"):
        run(data, tmp_path / "run", "cuda", data__shuffle=False, checkpoint__every=5, data__batch_size=70)
    whole = write_data(tmp_path / "whole")
    run(whole, tmp_path / "same", "cuda", data__shuffle=False, checkpoint__every=5, data__batch_size=70, train__steps=5)
    assert losses(tmp_path / "run")[:5] == losses(tmp_path / "same")


def test_a_launcher_environment_and_an_automatic_plan(data, tmp_path, monkeypatch):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}
    for name, value in (here | {"MASTER_PORT": port}).items():
        monkeypatch.setenv(name, str(value))
    result = run(data, tmp_path / "run", "auto", embeddings__sharding="auto")
    assert result["device"] == "cuda"
    assert result["step"] == STEPS


def test_the_planner_knows_the_memory_of_the_gpu(data, tmp_path):
    memory = torch.cuda.get_device_properties(0).total_memory
    values = mapping(data, tmp_path / "run", "cuda", embeddings__kernel="fused")
    values["schema"]["sparse"]["user"]["num_ids"] = 2 * memory // (4 * 8)
    with pytest.raises(PlanError, match=f"available: {memory / 2**30:.3f} GiB per rank"):
        train.run(from_mapping(values))
