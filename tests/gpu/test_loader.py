"""Batches in page-locked memory reach the GPU unchanged."""

from __future__ import annotations

import pytest
import torch

from dist_rec.config import from_mapping
from dist_rec.data.batch import Batch
from dist_rec.data.footers import read_footers
from dist_rec.data.loader import Loader
from tests.gpu.jobs import BATCH, mapping

WAIT_CYCLES = 20_000_000  # some 10 ms, in which the reader makes many batches


def _tensors(batch: Batch) -> list[torch.Tensor]:
    return [batch.dense, batch.sparse.values(), batch.sparse.lengths(), batch.labels, batch.weights]


@pytest.mark.parametrize("multi", [True, False], ids=["bags", "one_id_each"])
def test_page_locked_memory_is_not_used_again_before_it_was_copied(data, tmp_path, multi):
    values = mapping(data, tmp_path, "cuda", data__shuffle_rows=2 * BATCH)
    if not multi:
        del values["schema"]["sparse"]["tags"]
    config = from_mapping(values)
    loader = Loader(config.data, config.schema, read_footers(str(data)), rank=0, world_size=1, batch_size=BATCH,
                    seed=0, shuffle=True, epochs=2, pin_memory=True)  # fmt: skip
    expected, copied = [], []
    for batch in loader:
        assert all(x.is_pinned() for x in _tensors(batch))
        expected.append([x.clone() for x in _tensors(batch)])
        torch.cuda._sleep(WAIT_CYCLES)  # the copies wait for this; the host does not
        copied.append(_tensors(batch.to(torch.device("cuda"), non_blocking=True)))
        del batch
    torch.cuda.synchronize()
    assert len(copied) == 128
    for step, (wanted, found) in enumerate(zip(expected, copied, strict=True)):
        for x, y in zip(wanted, found, strict=True):
            assert torch.equal(x, y.cpu()), f"batch {step} was overwritten before its copy ended"
