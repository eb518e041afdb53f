"""The row store: padding, windows, checkpoints, and that N ranks' rows give one rank's metrics."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dist_rec.contract import StepOutput
from dist_rec.data.schema import GroupColumn, LabelColumn, Schema, SparseColumn
from dist_rec.metrics import rows as rows_module
from dist_rec.metrics.compute import MetricsConfig, compute
from dist_rec.metrics.rows import Rows, RowStore
from tests.ranks import run_ranks

SCHEMA = Schema(
    labels={"click": LabelColumn(), "buy": LabelColumn()},
    sparse={"s": SparseColumn(num_ids=2)},
    groups={"domain": GroupColumn(column="domain"), "user": GroupColumn(column="user")},
)
CONFIG = MetricsConfig(by=["domain"], grouped_auc=["user"])
BATCH = 12


def step(number: int, padding: int = 0) -> StepOutput:
    """The output of step `number` for all ranks; its last `padding` rows are padding."""
    g = torch.Generator().manual_seed(number)
    weights = torch.rand(BATCH, generator=g) + 0.5
    weights[BATCH - padding :] = 0
    return StepOutput(
        predictions=torch.randn(BATCH, 2, generator=g).round(decimals=1),
        labels=torch.randint(0, 2, (BATCH, 2), generator=g).float(),
        weights=weights,
        groups={
            "domain": torch.randint(0, 3, (BATCH,), generator=g),
            "user": torch.randint(0, 2**62, (BATCH,), generator=g) % 7 + 2**60,
            "unused": torch.zeros(BATCH, dtype=torch.int64),
        },
        losses={},
    )


def share(output: StepOutput, rank: int, world_size: int) -> StepOutput:
    """The rows that `rank` of `world_size` ranks has of a step."""

    def part(x: torch.Tensor) -> torch.Tensor:
        return x.chunk(world_size)[rank]

    groups = {name: part(x) for name, x in output.groups.items()}
    return StepOutput(part(output.predictions), part(output.labels), part(output.weights), groups, {})


def make_store(window_rows: int | None = None) -> RowStore:
    return RowStore(num_labels=2, groups=CONFIG.groups, window_rows=window_rows)


def assert_same(a: Rows, b: Rows) -> None:
    for x, y in ((a.predictions, b.predictions), (a.labels, b.labels), (a.weights, b.weights)):
        np.testing.assert_array_equal(x, y)
    assert a.groups.keys() == b.groups.keys()
    for name in a.groups:
        np.testing.assert_array_equal(a.groups[name], b.groups[name])


def test_keeps_every_column_and_drops_padding() -> None:
    store, outputs = make_store(), [step(0), step(1, padding=5)]
    for output in outputs:
        store.append(output)
    rows = store.rows()
    assert len(rows.weights) == 2 * BATCH - 5
    kept = torch.cat([o.weights for o in outputs]) > 0
    np.testing.assert_array_equal(rows.predictions, torch.cat([o.predictions for o in outputs])[kept])
    np.testing.assert_array_equal(rows.labels, torch.cat([o.labels for o in outputs])[kept])
    assert list(rows.groups) == ["domain", "user"]
    np.testing.assert_array_equal(rows.groups["user"], torch.cat([o.groups["user"] for o in outputs])[kept])


def test_owns_its_rows() -> None:
    store, output = make_store(), step(0)
    store.append(output)
    before = store.rows()
    for tensor in (output.predictions, output.labels, output.weights, *output.groups.values()):
        tensor.zero_()
    assert_same(store.rows(), before)


def test_bfloat16_logits_are_stored_as_float32() -> None:
    store, output = make_store(), step(0)
    store.append(output._replace(predictions=output.predictions.bfloat16()))
    assert store.rows().predictions.dtype == np.float32


@pytest.mark.parametrize(("window", "steps"), [(1, 1), (BATCH, 1), (BATCH + 1, 2), (3 * BATCH, 3), (1000, 5)])
def test_window_is_the_fewest_whole_steps_that_fill_it(window: int, steps: int) -> None:
    store, expected = make_store(window), make_store()
    for number in range(5):
        store.append(step(number))
    for number in range(5 - steps, 5):
        expected.append(step(number))
    assert_same(store.rows(), expected.rows())


def test_empty_store_and_clear() -> None:
    store = make_store()
    assert store.rows().predictions.shape == (0, 2)
    store.append(step(0))
    store.clear()
    assert store.rows().groups["user"].shape == (0,)
    assert store.merged() is not None


def test_offload_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = make_store()
    for number in range(7):
        expected.append(step(number, padding=number % 3))
    monkeypatch.setattr(rows_module, "_OFFLOAD_ROWS", 2 * BATCH)
    store = make_store()
    for number in range(7):
        store.append(step(number, padding=number % 3))
    assert store.state()["lengths"].tolist() == [2 * BATCH - 1, 2 * BATCH - 2, 2 * BATCH - 3, BATCH]
    assert_same(store.rows(), expected.rows())


def test_checkpoint_continues_the_window_exactly(tmp_path: object) -> None:
    store = make_store(3 * BATCH - 1)
    for number in range(4):
        store.append(step(number, padding=number))
    torch.save(store.state(), f"{tmp_path}/rows.pt")
    resumed = make_store(3 * BATCH - 1)
    resumed.load_state(torch.load(f"{tmp_path}/rows.pt", weights_only=True))
    assert_same(resumed.rows(), store.rows())
    for number in range(4, 7):
        store.append(step(number))
        resumed.append(step(number))
        assert_same(resumed.rows(), store.rows())


def test_one_rank_takes_over_the_rows_of_two() -> None:
    parts, expected, resumed = [make_store(), make_store()], make_store(), make_store(window_rows=2 * BATCH)
    for number in range(2):
        expected.append(step(number))
        for rank, part in enumerate(parts):
            part.append(share(step(number), rank, 2))
    for part in parts:
        resumed.load_state(part.state())
    wanted = compute(expected.rows(), SCHEMA, CONFIG)
    assert compute(resumed.rows(), SCHEMA, CONFIG) == pytest.approx(wanted, rel=1e-12, nan_ok=True)


def test_empty_state_round_trip() -> None:
    store = make_store()
    store.load_state(make_store().state())
    assert store.rows().predictions.shape == (0, 2)


def test_state_of_other_settings(caplog: pytest.LogCaptureFixture) -> None:
    saved = RowStore(num_labels=2, groups=["domain"])
    saved.append(step(0))
    store = make_store()
    with caplog.at_level(logging.WARNING):
        store.load_state(saved.state())
    assert "lack the group 'user'" in caplog.text
    assert len(store.rows().weights) == 0
    with pytest.raises(ValueError, match="have 2 labels, but the schema has 1"):
        RowStore(num_labels=1).load_state(saved.state())


def merged_metrics(rank: int, world_size: int) -> dict[str, dict[str, float] | None]:
    """Metrics of everything, of a window, and of rows that only some ranks have."""
    # One row per message and a second group, so that chunking and group ranks are exercised too.
    rows_module._MESSAGE_ROWS = 5
    everything, window, uneven = make_store(), make_store(-(-2 * BATCH // world_size)), make_store()
    for number in range(6):
        mine = share(step(number, padding=3 if number == 5 else 0), rank, world_size)
        everything.append(mine)
        window.append(mine)
    if rank == world_size - 1:
        uneven.append(step(0))
    gloo = dist.new_group(backend="gloo")
    result: dict[str, dict[str, float] | None] = {}
    for name, store in (("everything", everything), ("window", window), ("uneven", uneven)):
        rows = store.merged(gloo)
        result[name] = None if rows is None else compute(rows, SCHEMA, CONFIG)
    return result


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_equal_one_rank(world_size: int) -> None:
    stores = {"everything": make_store(), "window": make_store(2 * BATCH), "uneven": make_store()}
    for number in range(6):
        for name in ("everything", "window"):
            stores[name].append(step(number, padding=3 if number == 5 else 0))
    stores["uneven"].append(step(0))
    first, *others = run_ranks(merged_metrics, world_size)
    for name, store in stores.items():
        rows = store.merged()
        assert rows is not None
        expected = compute(rows, SCHEMA, CONFIG)
        assert first[name].keys() == expected.keys()
        for key, value in expected.items():
            assert first[name][key] == pytest.approx(value, rel=1e-12, nan_ok=True), f"{name} {key}"
        assert np.isfinite(expected["click/auc"])
        assert all(other[name] is None for other in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rows_on_a_gpu_equal_those_on_the_host() -> None:
    host, device = make_store(3 * BATCH), make_store(3 * BATCH)
    for number in range(5):
        output = step(number, padding=number)
        host.append(output)
        groups = {name: x.cuda() for name, x in output.groups.items()}
        device.append(
            StepOutput(output.predictions.cuda(), output.labels.cuda(), output.weights.cuda(), groups, losses={})
        )
    assert_same(device.rows(), host.rows())
    for name, saved in device.state().items():
        assert torch.equal(saved, host.state()[name]), name
