"""Which torch, torchrec and fbgemm belong together: the one place where the three are pinned, and the guard at import.

The three share C++ symbols, so a wrong mixture ends in undefined symbols or silently missing operators. The guard
reads package metadata only; it must stay cheap and must not import torch. `scripts/setup` runs this file as a program.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from typing import NamedTuple


class Stack(NamedTuple):
    """Releases of the three packages that were tested together."""

    torch: str
    torchrec: str
    fbgemm: str

    def __str__(self) -> str:
        return f"torch {self.torch}, torchrec {self.torchrec}, fbgemm-gpu {self.fbgemm}"


TESTED = (Stack("2.13.0", "1.8.0", "1.8.0"), Stack("2.11.0", "1.6.1", "1.6.0"))
"""The first is what `scripts/setup` installs."""

FBGEMM = {"cpu": "fbgemm-gpu-cpu", "cuda": "fbgemm-gpu"}
"""Variant -> distribution. Both unpack into the folder `fbgemm_gpu`, so at most one of them can work."""

REPORTED = ("torch", "torchrec", *FBGEMM.values(), "torchmetrics", "torchx", "pyarrow", "omegaconf", "numpy")


def pins(variant: str, torch: str = TESTED[0].torch) -> list[str]:
    """The three requirements of a tested stack, torch first."""
    stack = next((s for s in TESTED if s.torch == torch), None)
    if variant not in FBGEMM or stack is None:
        known = " or ".join(FBGEMM), " or ".join(s.torch for s in TESTED)
        raise ValueError(f"no pins for variant '{variant}' with torch '{torch}'; known are {known[0]} with {known[1]}")
    return [f"torch=={stack.torch}", f"{FBGEMM[variant]}=={stack.fbgemm}", f"torchrec=={stack.torchrec}"]


def installed() -> dict[str, str]:
    """Version of Python and of each reported package that is installed, for a run's `result.json`."""
    found = {name: _version(name) for name in REPORTED}
    return {"python": platform.python_version()} | {name: v for name, v in found.items() if v is not None}


def check() -> None:
    """Raises ImportError, naming what is installed, the tested stacks and the install line, unless a tested stack is.

    Patch releases and local labels (+cpu, +cu130) are free: the C++ interface changes with the minor release.
    """
    torch, torchrec = _version("torch"), _version("torchrec")
    fbgemm = {name: v for name in FBGEMM.values() if (v := _version(name)) is not None}
    if len(fbgemm) > 1:
        both = " and ".join(fbgemm)
        raise ImportError(f"{both} are both installed and overwrite each other's files.\n{_fix()}")
    have = (torch, torchrec, next(iter(fbgemm.values()), None))
    if None not in have and any(tuple(map(_minor, stack)) == tuple(map(_minor, have)) for stack in TESTED):
        return
    names = ("torch", "torchrec", next(iter(fbgemm), " / ".join(FBGEMM.values())))
    listed = ", ".join(f"{name} {version or '(not installed)'}" for name, version in zip(names, have, strict=True))
    tested = "".join(f"\n  {stack}" for stack in TESTED)
    must = f"torch, torchrec and fbgemm must be a tested set; {sys.executable} has"
    raise ImportError(f"{must}\n  {listed}\ntested are{tested}\n{_fix()}")


def _fix() -> str:
    torch, fbgemm, torchrec = pins("cpu")
    return (
        "fix: run `scripts/setup` in the project's root and use .venv/bin/python, or, in an environment of your own,\n"
        f"  pip uninstall -y {' '.join(FBGEMM.values())}\n"
        f"  pip install {torch} {fbgemm} && pip install --no-deps {torchrec}\n"
        f"with {pins('cuda')[1]} in place of {fbgemm} for CUDA."
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _minor(version: str | None) -> list[str]:
    return (version or "").partition("+")[0].split(".")[:2]


if __name__ == "__main__":
    print(*pins(*sys.argv[1:]), sep="\n")
