"""kill -9 of one rank of a real job at a random step: the job fails, and goes on without losing or repeating a row."""

from __future__ import annotations

import importlib.util
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from tests import runs

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


def _default_interrupt() -> None:
    """What shells start in the background ignores SIGINT, and so do its children unless told otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_a_run_with_one_message_and_it_goes_on(tmp_path):
    data = runs.write(tmp_path / "data", 2000)
    card, folder = tmp_path / "card.yaml", tmp_path / "run"
    card.write_text(yaml.safe_dump(runs.values(data, folder, train={"epochs": 4000}, checkpoint={"every": 20})))
    command = [sys.executable, "-m", "dist_rec.train", str(card)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes, preexec_fn=_default_interrupt) as job:
        for line in job.stdout:
            if line.startswith("train  step 40/"):
                break
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted; the same command goes on from the newest checkpoint in run.dir" in errors
    done = subprocess.run([*command, "train.steps=80"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stdout
