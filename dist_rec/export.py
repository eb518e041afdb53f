"""Writes what is served of a trained run: `dist-rec export CONFIG [key=value ...]`, in one process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_rec import versions
from dist_rec.config import RunConfig, to_mapping, to_yaml
from dist_rec.job import load_config, run_entry
from dist_rec.recommender import plain, served
from dist_rec.serving.collapse import collapse, format_report
from dist_rec.serving.exported import CONFIG, REPORT, TENSORS
from dist_rec.settings import Complaint, ConfigError
from dist_rec.training.checkpoint import trained
from dist_rec.training.compatible import check_compatible
from dist_rec.training.report import to_json
from dist_rec.training.stored import StoredModel

USAGE = """usage: dist-rec export CONFIG [key=value ...]

Writes the plain model of a run to run.dir/export: two-layer tables become single ones, auxiliaries and what else only
training needs are left out, tensors have the names and shapes of a model that was trained without them. Needs one
process, no GPU, and memory that does not depend on the number of rows. CONFIG is the one the run was trained with, or
the config.yaml in its folder.

  model.safetensors   the tensors          config.yaml   the plain config          report.json   what is printed

Overrides:
  run.dir=runs/mine                the run whose checkpoints are read
  export.step=1000                 which checkpoint; default: the best of an early-stopping run, else the newest
  export.path=models/mine          another folder; an export that is there is replaced
"""


def run(config: RunConfig) -> dict[str, Any]:
    """Exports by `config`; returns what report.json holds."""
    folder = Path(config.export.path or f"{config.run.dir}/export")
    if folder.exists() and not (folder / REPORT).is_file():
        text = f"is '{folder}', which exists and is no export; choose another folder, or remove it"
        raise ConfigError([Complaint("export.path", text)])
    checkpoint = trained(Path(config.run.dir) / "checkpoints", config.export.step)
    check_compatible(checkpoint.meta["config"], to_mapping(config))
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with StoredModel(checkpoint.path) as stored:
        step = {"step": str(checkpoint.step)}
        collapsed = collapse(stored, served(config).state_dict(), temporary / TENSORS, step)
    report = {"step": checkpoint.step, "checkpoint": str(checkpoint.path), **asdict(collapsed)}
    report["versions"] = versions.installed()
    (temporary / CONFIG).write_text(to_yaml(plain(config)))
    (temporary / REPORT).write_text(to_json(report, indent=1))
    _replace(folder, temporary)
    print(f"step {checkpoint.step}, {checkpoint.path} -> {folder}")
    print("\n".join(format_report(collapsed)))
    return report


def _replace(folder: Path, temporary: Path) -> None:
    """Puts the finished folder in its place. Between two renames there is none; there never is half of one."""
    old = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _main(arguments: Sequence[str]) -> None:
    run(load_config(arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.export` and `dist-rec export`."""
    run_entry(_main, arguments, USAGE)


if __name__ == "__main__":
    main()
