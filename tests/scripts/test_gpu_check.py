"""scripts/gpu_check where it cannot run: it says so, with an exit code of its own, and leaves no result file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def _check(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    # no GPU is visible: where there is one, this test must not start the whole check
    env = os.environ | {"PYTHON": python, "CUDA_VISIBLE_DEVICES": "-1"}
    command = ["scripts/gpu_check", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("python", "reason"),
    [
        (sys.executable, "is a CPU build" if torch.version.cuda is None else "finds no GPU"),
        ("no/such/python", "there is no no/such/python. Run scripts/setup cuda, or set PYTHON."),
    ],
)
def test_without_a_gpu_it_says_why_and_ends_with_3(tmp_path: Path, python: str, reason: str) -> None:
    done = _check(tmp_path / "results", python)
    assert done.returncode == 3
    assert done.stderr.startswith("scripts/gpu_check cannot run here: ") and reason in done.stderr
    assert done.stdout == "" and not (tmp_path / "results").exists()
