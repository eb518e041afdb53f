"""scripts/demo refuses what it cannot run before it sets anything up, and trains on the rows that are for training.

All three scripts say how to call them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "'nowhere' is not a folder"),
        (["configs"], "no CONFIG after 'configs'; `.venv/bin/dist-rec init configs -o CONFIG` writes one"),
        (["configs", "nothing.yaml"], "'nothing.yaml' is not a config file"),
        (["--steps", "3"], "takes no options"),
    ],
)
def test_a_wrong_call_says_what_is_wrong_and_how_to_call(arguments: list[str], complaint: str) -> None:
    done = subprocess.run(
        ["scripts/demo", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=False
    )
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "use: scripts/demo [DATA_FOLDER CONFIG] [key=value ...]" in done.stderr


@pytest.mark.parametrize("script", ["demo", "setup", "test"])
def test_help_is_the_head_of_the_script(script: str) -> None:
    done = subprocess.run([f"scripts/{script}", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 and done.stderr == ""
    assert f"scripts/{script}  " in done.stdout or f"scripts/{script} [" in done.stdout
    assert "set -e" not in done.stdout and "#" not in done.stdout


def _demo(root: Path, *arguments: str) -> list[str]:
    """What the script, in a project that is set up, gives TorchX after `--`; `arguments` are seen from `root`'s parent.

    In place of TorchX stands a program that prints its arguments.
    """
    scripts, programs = root / "scripts", root / ".venv" / "bin"
    for folder in (scripts, programs):
        folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "scripts" / "demo", scripts / "demo")
    for program, does in (
        (scripts / "setup", "exit 0"),
        (programs / "torchx", "printf '%s\\n' \"$@\""),
        (programs / "python", f'exec {sys.executable} "$@"'),
    ):
        program.write_text(f"#!/bin/sh\n{does}\n")
        program.chmod(0o755)
    done = subprocess.run(
        [scripts / "demo", *arguments],
        cwd=root.parent,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    passed = done.stdout.partition("\n\n")[0].splitlines()
    return [setting for setting in passed[passed.index("--") + 1 :] if not setting.startswith("run.dir=")]


def test_rows_of_other_splits_are_not_trained_on(tmp_path: Path) -> None:
    rows = pa.table({"click": [0, 1]})
    for name in ("files/train", "files/test", "parts/1", "parts/2"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(rows, tmp_path / f"{name}.parquet")
    (tmp_path / "other.yaml").write_text("data: {train: elsewhere}\n")
    (tmp_path / "own.yaml").write_text("data: {train: parts/1.parquet, test: parts/2*, validation: elsewhere}\n")
    for folder, config, expected in (
        ("files", "other", {"train": "files/train.parquet", "test": "files/test.parquet"}),
        ("parts", "own", {"train": "parts/1.parquet", "test": "parts/2*"}),
    ):
        found = _demo(tmp_path / "project", folder, f"{config}.yaml", "train.steps=3")
        assert found == [*(f"data.{key}={tmp_path}/{path}" for key, path in expected.items()), "train.steps=3"]
