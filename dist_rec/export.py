"""Writes what is served of a trained run: `dist-rec export CONFIG [key=value ...]`, in one process."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_rec import versions
from dist_rec.config import NO_DEVICE, RunConfig, load, to_mapping, to_yaml
from dist_rec.data.catalogue import Catalogue
from dist_rec.data.footers import read_footers
from dist_rec.job import run_entry
from dist_rec.predict import load_part, open_items
from dist_rec.recommender import plain, served
from dist_rec.serving.collapse import Collapsed, collapse, format_report
from dist_rec.serving.exported import CONFIG, REPORT, TENSORS
from dist_rec.serving.retrieval import (
    INDEX,
    ITEM,
    QUERY,
    VECTORS,
    empty_index,
    index_recall,
    write_index,
    write_vectors,
)
from dist_rec.settings import Complaint, ConfigError
from dist_rec.training.checkpoint import trained
from dist_rec.training.compatible import check_same_model
from dist_rec.training.report import to_json
from dist_rec.training.runtime import check_writable
from dist_rec.training.stored import StoredModel

USAGE = """usage: dist-rec export CONFIG [key=value ...]

Writes the plain model of a run to run.dir/export: two-layer tables become single ones, auxiliaries and what else only
training needs are left out, tensors have the names and shapes of a model that was trained without them. Needs one
process, no GPU, and memory that does not depend on the number of rows of a table; an index over items is in memory as a
whole. CONFIG is the one the run was trained with, or the config.yaml in its folder.

  model.safetensors   the tensors          config.yaml   the plain config          report.json   what is printed

Of a model with two towers the folder has the folders query and item, an export of each tower with these files, and

  items.parquet       every item of data.items and its vector
  items.faiss         an index over them (needs faiss-cpu), whose recall against exact search is printed; Flat takes
                      4 bytes x items x width, here and in memory

Overrides:
  run.dir=runs/mine                the run whose checkpoints are read
  export.step=1000                 which checkpoint; default: the best of an early-stopping run, else the newest
  export.path=models/mine          another folder; an export that is there is replaced
  export.index=HNSW32              FAISS's name of the index; auto (default), or none
"""


def run(config: RunConfig) -> dict[str, Any]:
    """Exports by `config`; returns what report.json holds."""
    folder = Path(config.export.path or f"{config.run.dir}/export")
    if folder.exists() and not (folder / REPORT).is_file():
        text = f"is '{folder}', which exists and is no export; choose another folder, or remove it"
        raise ConfigError([Complaint("export.path", text)])
    checkpoint = trained(Path(config.run.dir) / "checkpoints", config.export.step)
    check_same_model(checkpoint.meta["config"], to_mapping(config))
    if problems := list(check_writable(folder.parent, "export.path")):
        raise ConfigError(problems)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    report = {"step": checkpoint.step, "checkpoint": str(checkpoint.path), "versions": versions.installed()}
    try:
        lines = _write_all(config, checkpoint.path, report, temporary)
        _replace(folder, temporary)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"step {checkpoint.step}, {checkpoint.path} -> {folder}")
    print("\n".join(lines))
    return json.loads((folder / REPORT).read_text())


def _write_all(config: RunConfig, checkpoint: Path, report: dict[str, Any], folder: Path) -> list[str]:
    """Everything that an export holds, from the checkpoint in folder `checkpoint`; returns what there is to print."""
    lines: list[str] = []
    empty = _empty_index(config)
    parts = config.model.parts() if hasattr(config.model, "parts") else {"": config.model}
    shapes = {name: served(replace(config, model=part)).state_dict() for name, part in parts.items()}
    with StoredModel(checkpoint) as stored:
        for name, part in parts.items():
            others = {n for other, tensors in shapes.items() if other != name for n in tensors}
            own = plain(replace(config, model=part))
            collapsed = _write(stored, own, shapes[name], others, folder / name, report)
            lines += [*([f"{name}:"] if name else []), *format_report(collapsed)]
    if config.evaluation == "retrieval":
        found = _write_catalogue(config, folder, empty)
        lines += [f"{name}: {value}" for name, value in found.items()]
        (folder / REPORT).write_text(to_json({**report, **found}, indent=1))
    return lines


def _write(
    stored: StoredModel,
    config: RunConfig,
    shapes: Mapping[str, Tensor],
    others: Collection[str],
    folder: Path,
    report: dict[str, Any],
) -> Collapsed:
    """One export of a plain config: its tensors, of the names and shapes in `shapes`, and what goes with them."""
    folder.mkdir(exist_ok=True)
    collapsed = collapse(stored, shapes, folder / TENSORS, {"step": str(report["step"])}, others)
    (folder / CONFIG).write_text(to_yaml(config))
    (folder / REPORT).write_text(to_json({**report, **asdict(collapsed)}, indent=1))
    return collapsed


def _empty_index(config: RunConfig) -> tuple[Any, str] | None:
    """The index that is wanted, made before anything is computed, so that what is wrong with it costs nothing."""
    if config.evaluation != "retrieval" or config.export.index == "none":
        return None
    width = served(config).dense.arch.representation_dims[ITEM]
    return empty_index(config.export.index, len(open_items(config)), width, config.export.probes)


def _write_catalogue(config: RunConfig, folder: Path, empty: tuple[Any, str] | None) -> dict[str, Any]:
    """The vectors of all items and the index over them; what there is to say of these."""
    assert config.schema.items is not None
    part, batch_size = load_part(folder / ITEM), config.data.eval_batch_size or config.data.batch_size
    table = open_items(part.config)
    started = time.perf_counter()
    with torch.no_grad():
        encode = partial(part.model.represent, name=ITEM)
        key = config.schema.items.key
        write_vectors(folder / VECTORS, key, Catalogue(config.schema, table), encode, batch_size)
    found: dict[str, Any] = {"items": len(table), "encode_seconds": time.perf_counter() - started}
    if empty is None:
        return found
    index, factory = empty
    write_index(index, factory, folder / VECTORS, folder / INDEX)
    index.reset()  # it is read again below, as whoever uses it will
    split, queries = _queries(config, folder)
    recall = index_recall(folder / INDEX, folder / VECTORS, queries, config.export.recall_at)
    told = f"index_recall@{config.export.recall_at}"
    return {**found, "index": factory, "queries": f"{len(queries)} rows of {split}", told: recall}


def _queries(config: RunConfig, folder: Path) -> tuple[str, Tensor]:
    """Vectors of some rows of the first split that there is, and its name."""
    split = next(s for s in ("validation", "test", "train") if getattr(config.data, s) is not None)
    most, found = config.export.recall_queries, []
    part = load_part(folder / QUERY)
    loader = part.loader(read_footers(getattr(config.data, split)), min(most, config.data.batch_size))
    try:
        with torch.no_grad():
            for batch in loader:
                found.append(part.model.represent(batch, QUERY)[batch.weights > 0])
                if sum(map(len, found)) >= most:
                    break
    finally:
        loader.close()
    return split, torch.cat(found)[:most]


def _replace(folder: Path, temporary: Path) -> None:
    """Puts the finished folder in its place. Between two renames there is none; there never is half of one."""
    old = folder.with_name(f".{folder.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def _main(arguments: Sequence[str]) -> None:
    run(load(arguments[0], arguments[1:], NO_DEVICE))  # a run of GPUs is exported where there are none


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.export` and `dist-rec export`."""
    run_entry(_main, arguments, USAGE)


if __name__ == "__main__":
    main()
