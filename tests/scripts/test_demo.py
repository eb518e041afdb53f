"""scripts/demo refuses what it cannot run before it sets anything up; all three scripts say how to call them."""

from __future__ import annotations

import subprocess
from pathlib import Path

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
