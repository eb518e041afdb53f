"""kill -9 of one rank of a real job at a random step: the job fails, and goes on without losing or repeating a row."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def study() -> ModuleType:
    """scripts/studies/kill_and_resume.py, which does the same for many rounds."""
    spec = importlib.util.spec_from_file_location("kill_and_resume", ROOT / "scripts/studies/kill_and_resume.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_killed_job_goes_on_with_every_row_once_per_epoch(study, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    card = study.write_card(study.write_data(tmp_path / "data"))
    result = study.one_round(card, tmp_path / "run", random.Random(3), ranks=2, continued_on=3, undisturbed=None)
    print(result)
    assert result.exit_code != 0
    assert result.killed_after_step >= 8
    # never from a checkpoint that was still being written, and never from the start
    assert 7 <= result.continued_from <= result.killed_after_step + 1 and result.continued_from % 7 == 0
    assert (result.missing, result.repeated) == (0, 0)
    assert result.is_good
