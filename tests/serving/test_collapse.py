"""From a checkpoint to the served tensors: exact, strict, and in memory that the number of rows has no part in."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dist_rec.serving.collapse import BLOCK_BYTES, collapse
from dist_rec.serving.tensor_file import read
from dist_rec.training.checkpoint import CheckpointError
from dist_rec.training.stored import StoredModel

TABLE, SECOND = "embeddings.collection.embedding_bags.main_user.weight", "embeddings.projections.main_user"
PLAIN = "embeddings.collection.embedding_bags.main_item.weight"


def _state(rows: int = 1000, k: int = 12, d: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        TABLE: torch.randn(rows, k, generator=generator),
        SECOND: torch.randn(k, d, generator=generator),
        PLAIN: torch.randn(77, d, generator=generator),
        "dense.arch.head.weight": torch.randn(3, 5, generator=generator),
        "dense.arch.norm.num_batches_tracked": torch.tensor(9),
    }


def _served(rows: int = 1000, d: int = 4) -> dict[str, torch.Tensor]:
    state = {name: t.to("meta") for name, t in _state(rows=1, d=d).items() if name != SECOND}
    return state | {TABLE: torch.empty(rows, d, device="meta")}


def _save(folder: Path, state: dict[str, torch.Tensor]) -> StoredModel:
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": state, "optimizer": {"x": torch.zeros(2)}}, storage_writer=writer, no_dist=True)
    return StoredModel(folder)


def test_a_stored_tensor_is_read_in_any_blocks(tmp_path):
    state = _state()
    with _save(tmp_path, state) as stored:
        assert stored.tensors.keys() == state.keys(), "optimiser state is none of the model's"
        for name, tensor in state.items():
            assert torch.equal(stored.tensors[name].whole(), tensor)
        table = stored.tensors[TABLE]
        blocks = list(table.blocks(1000))
        assert len(blocks) == 50 and blocks[0] == (0, 20), "12 columns of 4 bytes: 20 rows are 960 bytes"
        assert torch.equal(torch.cat([table.rows(*block) for block in blocks]), state[TABLE])
        assert list(table.blocks(1)) == [(i, i + 1) for i in range(1000)]


def test_two_layers_become_one_and_the_rest_stays(tmp_path):
    state = _state() | {"dense.auxiliaries.heads.weight": torch.ones(2), "dense.objective.scale": torch.ones(())}
    with _save(tmp_path / "step", state) as stored:
        found = collapse(stored, _served(), tmp_path / "out", {})
    written = read(tmp_path / "out")
    assert written.keys() == _served().keys()
    for name in written.keys() - {TABLE}:
        assert torch.equal(written[name], state[name]), name
    exact = state[TABLE].double() @ state[SECOND].double()
    assert torch.equal(written[TABLE], state[TABLE] @ state[SECOND])
    (table,) = found.tables
    assert (table.table, table.rows, table.inner_dim, table.dim) == ("main_user", 1000, 12, 4)
    assert table.max_error == (exact - written[TABLE]).abs().max().item() and 0 < table.max_error < 1e-5
    assert table.std == pytest.approx(exact.std(correction=0).item(), rel=1e-9)
    assert (table.bytes_before, table.bytes_after) == (4 * 1000 * 12 + 4 * 12 * 4, 4 * 1000 * 4)
    assert found.dropped == ["dense.auxiliaries.heads.weight", "dense.objective.scale"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({PLAIN: None}, f"{PLAIN} is not in the checkpoint"),
        ({PLAIN: torch.zeros(78, 4)}, rf"{PLAIN} is \[78, 4\] torch.float32, the model has \[77, 4\]"),
        ({PLAIN: torch.zeros(77, 4, dtype=torch.float64)}, "is .* torch.float64, the model has .* torch.float32"),
        ({SECOND: None}, rf"{TABLE} is \[1000, 12\]"),
        ({SECOND: torch.zeros(12, 8)}, rf"{TABLE} is \[1000, 8\]"),
        ({SECOND: torch.zeros(11, 4)}, rf"{TABLE} is \[1000, 12\]"),
        ({"embeddings.projections.main_item": torch.zeros(4, 5)}, rf"{PLAIN} is \[77, 5\]"),
        ({"embeddings.projections.gone": torch.zeros(4, 5)}, "projections.gone of the checkpoint has no place"),
        ({"dense.arch.extra": torch.zeros(1)}, "dense.arch.extra of the checkpoint has no place in the model"),
    ],
)
def test_a_tensor_too_few_too_many_or_of_another_shape_is_named(tmp_path, change, message):
    state = {name: t for name, t in (_state() | change).items() if t is not None}
    with _save(tmp_path / "step", state) as stored, pytest.raises(CheckpointError, match=message):
        collapse(stored, _served(), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()


def _peak(work) -> int:
    """Bytes by which this process grows at most while `work` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # begins to measure the peak anew
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def _peaks(folder: Path) -> tuple[int, int, int]:
    """Peaks of collapsing a table and of holding it in memory, and its size."""
    k, d = 64, 4
    rows = 16 * BLOCK_BYTES // (4 * k)
    with _save(folder / "step", _state(rows, k, d)) as stored:
        for attempt in range(2):  # what code loads comes with the first
            peak = _peak(partial(collapse, stored, _served(rows, d), folder / str(attempt), {}))
        whole = _peak(stored.tensors[TABLE].whole)
    return peak, whole, stored.tensors[TABLE].num_bytes


def test_memory_does_not_grow_with_the_rows(tmp_path):
    # a process of its own: what others have freed would hide what this takes
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        peak, whole, size = pool.submit(_peaks, tmp_path).result()
    assert whole > 0.8 * size and size == 16 * BLOCK_BYTES, "the measure sees a table that is in memory"
    assert peak < 5 * BLOCK_BYTES, "a block, the same in double precision, and what belongs to them"
