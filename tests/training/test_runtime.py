"""The process of a run: whether there is a launcher, and how much memory the planner may count on."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dist_rec.training.runtime import RunSettings, process


def test_an_address_alone_is_no_launcher(monkeypatch, tmp_path):
    """Shells on clusters and notebooks export one; a plain `python -m dist_rec.train` there runs on one rank."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # what is set in there must end with the test
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with process(RunSettings(dir=str(tmp_path), device="cpu")) as here:
        assert (here.rank, here.world_size) == (0, 1)
        assert here.sum(torch.ones(1)).item() == 1
    assert not dist.is_initialized()


def test_a_launcher_without_an_address_is_told_so(monkeypatch, tmp_path):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ValueError, match="MASTER_ADDR expected"),
        process(RunSettings(dir=str(tmp_path), device="cpu")),
    ):
        pass
