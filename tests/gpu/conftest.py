"""Every test in this folder is marked `gpu` and skipped, with the reason, where it cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_rec.training.runtime import has_cuda_kernels
from tests.gpu.jobs import write_data

HERE = Path(__file__).parent


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device" if torch.version.cuda else "this build of torch has no CUDA"
    return None if has_cuda_kernels() else "the installed fbgemm has no CUDA kernels: fbgemm-gpu is missing"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of this folder."""
    missing = _missing()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if missing:
                item.add_marker(pytest.mark.skip(reason=missing))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows that every test trains on."""
    return write_data(tmp_path_factory.mktemp("data"))
