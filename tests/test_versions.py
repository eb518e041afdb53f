"""The version guard: which installed sets pass, and what a wrong one is told."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from dist_rec import versions


def pretend(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    """Only these distributions are installed."""
    names = {name.replace("_", "-"): version for name, version in found.items()}

    def version(name: str) -> str:
        if name not in names:
            raise importlib.metadata.PackageNotFoundError(name)
        return names[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    "found",
    [
        {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm_gpu_cpu": "1.8.0"},
        {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0"},
        {"torch": "2.13.1+cu130", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0+cu130"},
        {"torch": "2.11.0+cu130", "torchrec": "1.6.1", "fbgemm_gpu": "1.6.0"},
    ],
)
def test_a_tested_set_passes(monkeypatch: pytest.MonkeyPatch, found: dict[str, str]) -> None:
    pretend(monkeypatch, **found)
    versions.check()


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"torch": "2.12.0", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0"}, ["torch 2.12.0", "torch 2.13.0"]),
        ({"torch": "2.13.0", "torchrec": "1.6.1", "fbgemm_gpu": "1.6.0"}, ["torchrec 1.6.1", "torchrec 1.8.0"]),
        ({"torch": "2.13.0", "torchrec": "1.8.0"}, ["fbgemm-gpu-cpu / fbgemm-gpu (not installed)"]),
        ({}, ["torch (not installed), torchrec (not installed)"]),
        (
            {"torch": "2.13.0", "torchrec": "1.8.0", "fbgemm_gpu": "1.8.0", "fbgemm_gpu_cpu": "1.8.0"},
            ["are both installed", "pip uninstall -y fbgemm-gpu-cpu fbgemm-gpu"],
        ),
    ],
)
def test_any_other_set_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, str], words: list[str]
) -> None:
    pretend(monkeypatch, **found)
    with pytest.raises(ImportError) as error:
        versions.check()
    for word in [*words, "scripts/setup", "pip install torch==2.13.0 fbgemm-gpu-cpu==1.8.0"]:
        assert word in str(error.value)


def test_pins_name_each_variant_and_refuse_an_unknown_one() -> None:
    assert versions.pins("cpu") == ["torch==2.13.0", "fbgemm-gpu-cpu==1.8.0", "torchrec==1.8.0"]
    assert versions.pins("cuda", "2.11.0") == ["torch==2.11.0", "fbgemm-gpu==1.6.0", "torchrec==1.6.1"]
    with pytest.raises(ValueError, match=r"variant 'gpu' with torch '2.13.0'; known are cpu or cuda"):
        versions.pins("gpu")
    with pytest.raises(ValueError, match=r"torch '2.12.0'; known are .* with 2.13.0 or 2.11.0"):
        versions.pins("cpu", "2.12.0")


def test_installed_leaves_out_what_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, torch="2.13.0+cpu", numpy="2.4.6")
    assert list(versions.installed()) == ["python", "torch", "numpy"]
    assert versions.installed()["torch"] == "2.13.0+cpu"


def test_the_guard_does_not_import_torch() -> None:
    code = "import dist_rec, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
