"""What a run folder says about its run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunFolder:
    """A run's own record.

    Attributes:
        name: short, different for every run of a report. config: config.yaml as plain values.
        step: of the checkpoint that was evaluated. result: result.json, empty if the run has not ended.
        reports: the lines of metrics.jsonl. weights: the lines of weights.jsonl, none if it was not asked for.
    """

    name: str
    path: str
    config: dict[str, Any]
    step: int
    result: dict[str, Any]
    reports: list[dict[str, Any]]
    weights: list[dict[str, Any]]


def read_folder(name: str, path: str, config: dict[str, Any], step: int) -> RunFolder:
    """The record in the folder `path`; files that a run need not have may be missing."""
    folder = Path(path)
    result = folder / "result.json"
    return RunFolder(
        name=name,
        path=path,
        config=config,
        step=step,
        result=json.loads(result.read_text()) if result.exists() else {},
        reports=_lines(folder / "metrics.jsonl"),
        weights=_lines(folder / "weights.jsonl"),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    # a run that still trains may be in the middle of its last line
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def short_names(paths: Sequence[str]) -> list[str]:
    """For each of some different paths as many of its last parts as tell all of them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    for count in range(1, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(Path(path).resolve()) for path in paths]
