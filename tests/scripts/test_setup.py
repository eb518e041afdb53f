"""scripts/setup on machines that cannot do it, and its decisions, with a pip that only writes down its arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FAKE_PYTHON = f"""#!/bin/bash
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo venv >>asked ;;
  *"-m pip"*)
    echo "$*" | sed 's/.*--disable-pip-version-check//' >>asked
    sleep "${{PIP_SLEEPS:-0}}"
    if [ -n "$PIP_FAILS" ] && [[ "$*" =~ $PIP_FAILS ]]; then echo "$PIP_SAYS"; exit 1; fi ;;
  *"import torch"*) ;;
  *) exec {sys.executable} "$@" ;;
esac
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What scripts/setup reads of a clone, and a folder `bin` for the commands it shall find first."""
    root = tmp_path / "clone"
    for path in ("scripts/setup", "scripts/requirements", "pyproject.toml", "dist_rec/versions.py"):
        source, target = ROOT / path, root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    command(root, "python3", FAKE_PYTHON)
    return root


def command(folder: Path, name: str, text: str) -> None:
    """Puts a shell script in front of the PATH."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text if text.startswith("#!") else f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def setup(folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs scripts/setup of the folder."""
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    env = {name: value for name, value in os.environ.items() if name != "PYTHON"} | {"PATH": path} | env
    run = [str(folder / "scripts/setup"), *arguments]
    return subprocess.run(run, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)


def asked(folder: Path) -> list[str]:
    """What pip and venv were asked since the last time."""
    path = folder / "asked"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


OTHER_LIBC = f'#!/bin/bash\ncase "$*" in *libc_ver*) echo " " ;; *) exec {sys.executable} "$@" ;; esac\n'
OLD_LIBC = OTHER_LIBC.replace('" "', '"glibc 2.17"')
NO_VENV = f'#!/bin/bash\ncase "$*" in *ensurepip*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac\n'


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("python3", "echo 3.9.18", ["needs Python 3.11", "bin/python3: 3.9.18", "PYTHON=/path/to/python3.11"]),
        ("python3", "exit 1", ["needs Python 3.11", "bin/python3: does not start"]),
        ("python3", OTHER_LIBC, ["not glibc (musl?)", "Use a glibc system"]),
        ("python3", OLD_LIBC, ["glibc 2.17", "need 2.28"]),
        ("python3", NO_VENV, ["has no venv or no pip", "apt-get install python3-venv"]),
        (
            "uname",
            "[ $1 = -s ] && echo Darwin || echo arm64",
            ["no fbgemm wheel for Darwin arm64", "docker/Dockerfile"],
        ),
        ("uname", "[ $1 = -s ] && echo Linux || echo ppc64le", ["no fbgemm wheel for the 'cpu' variant on ppc64le"]),
    ],
)
def test_a_machine_that_cannot_is_told_why_and_what_to_do(folder: Path, name: str, text: str, words: list[str]) -> None:
    command(folder, name, text)
    # Where python3 does not serve, other interpreters on this machine must not step in.
    done = setup(folder, "cpu", **({"PYTHON": "python3"} if name == "python3" else {}))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) < 8
    for word in ["scripts/setup cannot go on:", *words]:
        assert word in done.stderr
    assert not (folder / ".venv").exists()


def test_an_unknown_variant_or_torch_names_the_known_ones(folder: Path) -> None:
    assert "'gpu' is not a variant" in setup(folder, "gpu").stderr
    assert "known are cpu or cuda with 2.13.0 or 2.11.0" in setup(folder, "cpu", "2.12.0").stderr


def test_it_builds_once_and_again_when_a_pin_or_the_variant_changes(folder: Path) -> None:
    assert setup(folder, "cpu").returncode == 0
    venv, torch, rest, _ = asked(folder)
    assert venv == "venv"
    assert "--no-deps torch==2.13.0+cpu" in torch
    assert "--no-deps -r scripts/requirements/run.txt" in rest
    assert rest.endswith("fbgemm-gpu-cpu==1.8.0 torchrec==1.8.0")

    assert setup(folder).returncode == 0
    assert setup(folder, "cpu").returncode == 0
    assert asked(folder) == []

    with (folder / "scripts/requirements/dev.txt").open("a") as file:
        file.write("another==1\n")
    assert setup(folder).returncode == 0
    assert asked(folder)[0] == "venv"

    assert setup(folder, "cuda", "2.11.0").returncode == 0
    _, torch, rest, _ = asked(folder)
    assert torch.endswith("-c scripts/requirements/run.txt torch==2.11.0")
    assert rest.endswith("fbgemm-gpu==1.6.0 torchrec==1.6.1")
    assert setup(folder).returncode == 0, "no argument keeps what is there"
    assert asked(folder) == []


def test_without_arguments_a_gpu_decides_the_variant(folder: Path) -> None:
    command(folder, "nvidia-smi", "echo 'GPU 0: one'")
    assert setup(folder).returncode == 0
    assert "fbgemm-gpu==1.8.0" in asked(folder)[2]


def test_a_half_built_environment_is_built_anew(folder: Path) -> None:
    done = setup(folder, "cpu", PIP_FAILS="torchrec==", PIP_SAYS="ERROR: disk full")
    assert done.returncode == 1
    assert "ERROR: disk full" in done.stderr
    assert "pip could not install the pinned packages" in done.stderr
    asked(folder)
    assert setup(folder, "cpu").returncode == 0
    assert asked(folder)[0] == "venv"


def test_an_activated_environment_is_replaced_by_the_python_it_was_made_from(folder: Path) -> None:
    command(
        folder,
        "python3",
        f'#!/bin/bash\ncase "$*" in *_base_executable*) echo "$BASE" ;; *) exec {sys.executable} "$@" ;; esac\n',
    )
    (folder / ".venv").mkdir()
    (folder / "bin").rename(folder / ".venv/bin")
    command(folder, "base", FAKE_PYTHON)
    path = f"{folder}/.venv/bin:{os.environ['PATH']}"
    done = setup(folder, "cpu", PATH=path, BASE=str(folder / "bin/base"))
    assert done.returncode == 0, done.stderr
    assert asked(folder)[0] == "venv"


def test_of_two_set_ups_at_once_one_builds_and_the_other_waits(folder: Path) -> None:
    with ThreadPoolExecutor() as pool:
        both = list(pool.map(lambda _: setup(folder, "cpu", PIP_SLEEPS="0.5"), range(2)))
    assert [done.returncode for done in both] == [0, 0], both
    assert sorted("another set-up is at work" in done.stderr for done in both) == [False, True]
    assert asked(folder).count("venv") == 1


ABSENT = "ERROR: No matching distribution found for torch==2.13.0+cpu"
ABSENT_UNDER_CONSTRAINTS = "ERROR: ResolutionImpossible: for help visit"  # a constraints file names torch too


@pytest.mark.parametrize("absent", [ABSENT, ABSENT_UNDER_CONSTRAINTS])
def test_the_cpu_wheel_is_looked_for_in_three_places(folder: Path, absent: str) -> None:
    done = setup(folder, "cpu", PIP_FAILS=r"\+cpu", PIP_SAYS=absent, TORCH_CPU_INDEX="https://wheels.example/cpu")
    assert done.returncode == 0
    configured, index, plain = asked(folder)[1:4]
    assert "torch==2.13.0+cpu" in configured
    assert "--index-url https://wheels.example/cpu torch==2.13.0+cpu" in index
    assert plain.endswith("torch==2.13.0")
    assert "WARNING: no CPU wheel there either" in done.stderr


def test_another_failure_of_pip_does_not_end_in_a_cuda_build(folder: Path) -> None:
    done = setup(folder, "cpu", PIP_FAILS=r"\+cpu", PIP_SAYS="ERROR: no space left on device")
    assert done.returncode == 1
    assert "no space left on device" in done.stderr
    assert len(asked(folder)) == 2
