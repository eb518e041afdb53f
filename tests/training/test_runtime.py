"""The process of a run: whether there is a launcher, and how much memory the planner may count on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_rec.training.runtime import RunSettings, host_memory, process


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


PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("", {}, PHYSICAL),
        ("0::/job/step\n", {"job/step/memory.max": "max", "job/memory.max": "4096", "memory.max": "max"}, 4096),
        ("0::/job\n", {"job/memory.max": str(2**62)}, PHYSICAL),
        # version 1, in a container: the path is the host's
        ("4:cpu,memory:/docker/ab\n1:cpu:/docker/ab\n0::/\n", {"memory/memory.limit_in_bytes": "8192"}, 8192),
        ("4:cpu:/job\n", {"memory/memory.limit_in_bytes": "8192"}, PHYSICAL),
    ],
)
def test_memory_is_the_machines_or_what_control_groups_allow(tmp_path, groups, limits, expected):
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": t for n, t in limits.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert host_memory(tmp_path) == expected
    assert 0 < host_memory(Path("/")) <= PHYSICAL
