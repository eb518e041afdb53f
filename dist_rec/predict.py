"""Scores a Parquet data set with an export: `dist-rec predict EXPORT DATA OUT [key=value ...]`, in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dist_rec.config import RunConfig, from_mapping, overrides_mapping, read
from dist_rec.data.batch import Batch
from dist_rec.data.footers import DataError, FileFooter, check_columns, open_file, read_footers
from dist_rec.data.ids import describe_policies
from dist_rec.data.loader import Loader
from dist_rec.data.schema import Schema
from dist_rec.job import run_entry
from dist_rec.recommender import Recommender, served
from dist_rec.serving.exported import CONFIG, TENSORS, check_folder, load_tensors, scoring_sections
from dist_rec.serving.scores import score_columns, score_names
from dist_rec.settings import Complaint, ConfigError, parse
from dist_rec.training.runtime import RunSettings, keep_freed_memory

USAGE = """usage: dist-rec predict EXPORT DATA OUT [key=value ...]

Scores every row of DATA (a Parquet file, folder, glob or URI) with the export in folder EXPORT and writes them to OUT,
a Parquet file, in the order of DATA: logit_<label>, and probability_<label> for binary labels. DATA needs the columns
that the model reads and no others: no labels, no weights. One process, no process group, constant memory; on a CPU the
tables stay on disk and are read where they are used.

  keep=[user_id,row]     columns of DATA to copy to OUT, before the scores
  overwrite=true         replace OUT if it exists
  batch_size=4096        rows per step; default: that of evaluation in training
  decode_threads=2       row groups decoded at the same time
  device=cpu             auto (default) takes a GPU that has room for the model, else the CPU
"""


@dataclass
class PredictSettings:
    """What `dist-rec predict` takes as key=value."""

    keep: list[str] = field(default_factory=list)
    overwrite: bool = False
    batch_size: int | None = None
    decode_threads: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def check(self) -> Iterator[Complaint]:
        """Complaints about the settings themselves."""
        for name in ("batch_size", "decode_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Complaint(name, f"is {value}; use at least 1")
        for name in {n for n in self.keep if self.keep.count(n) > 1}:
            yield Complaint("keep", f"names column '{name}' twice")


def run(export: Path, data: str, out: Path, settings: PredictSettings) -> dict[str, Any]:
    """Scores `data` into `out`; returns rows, seconds, device and what the schema's policies did.

    Raises:
        ConfigError, TensorFileError, DataError: for what is wrong with arguments, export and columns before a row is
            read. `out` is complete or not there.
    """
    started = time.perf_counter()
    if out.is_dir() or (out.exists() and not settings.overwrite):
        raise ConfigError([Complaint("OUT", f"is '{out}', which exists; choose another file, or set overwrite=true")])
    check_folder(export)
    config = from_mapping(scoring_sections(read(str(export / CONFIG))), device_type="cpu")
    footers = read_footers(data)
    schema = _scoring_schema(config)
    check_columns(footers, schema)
    fields = [*_kept(footers, settings.keep, config.schema), *_score_fields(config.schema)]
    device = _device(settings.device, (export / TENSORS).stat().st_size)
    model = served(config).eval()
    load_tensors(export, model)
    model.to(device)
    loader = Loader(
        replace(config.data, decode_threads=settings.decode_threads),
        schema,
        footers,
        rank=0,
        world_size=1,
        batch_size=settings.batch_size or config.data.eval_batch_size or config.data.batch_size,
        seed=0,
        shuffle=False,
        epochs=1,
        pin_memory=device.type == "cuda",
    )
    try:
        rows = _write(out, pa.schema(fields), _tables(model, loader, footers, settings.keep, config.schema, device))
    finally:
        loader.close()
    seconds = time.perf_counter() - started
    return {"rows": rows, "seconds": seconds, "device": str(device), "data_policies": dict(loader.counts)}


def _scoring_schema(config: RunConfig) -> Schema:
    """The features, and the groups without which the model would not be itself."""
    schema = config.schema
    groups = {}
    for name, group in schema.groups.items():
        others = {n: g for n, g in schema.groups.items() if n != name}
        if list(config.model.check(replace(schema, groups=others))):
            groups[name] = group
    return replace(schema, labels={}, weight=None, groups=groups)


def _kept(footers: list[FileFooter], names: list[str], schema: Schema) -> list[pa.Field]:
    """The columns to copy, as they are in every file."""
    fields = []
    for name in names:
        if name in score_names(schema):
            raise ConfigError([Complaint("keep", f"names '{name}', which is a column of scores; leave it out")])
        for footer in footers:
            if name not in footer.arrow_schema.names:
                has = ", ".join(footer.arrow_schema.names[:20])
                raise DataError(f"keep: column '{name}' is not in {footer.path}, which has {has}; correct the name")
            if footer.arrow_schema.field(name).type != footers[0].arrow_schema.field(name).type:
                first, here = (f.arrow_schema.field(name).type for f in (footers[0], footer))
                text = f"keep: column '{name}' is {first} in {footers[0].path} and {here} in {footer.path}"
                raise DataError(f"{text}; write it with one type, or leave it out")
        fields.append(pa.field(name, footers[0].arrow_schema.field(name).type))
    return fields


def _score_fields(schema: Schema) -> list[pa.Field]:
    return [pa.field(name, pa.float32()) for name in score_names(schema)]


def _device(wanted: str, num_bytes: int) -> torch.device:
    """A GPU if it is wanted or, by "auto", there and large enough for twice the model; else the CPU."""
    found = RunSettings(device="auto").device_type
    if wanted == "cuda" and found != "cuda":
        raise ConfigError([Complaint("device", "is cuda, but torch and fbgemm find no GPU; use cpu or auto")])
    if wanted == "cpu" or found == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    fits = 2 * num_bytes < torch.cuda.mem_get_info()[0]
    return torch.device("cuda" if wanted == "cuda" or fits else "cpu")


def _tables(
    model: Recommender, loader: Loader, footers: list[FileFooter], keep: list[str], schema: Schema, device: torch.device
) -> Iterator[pa.Table]:
    """One table for each row group of the data that has rows, in their order."""
    scores = (_score(model, batch, device) for batch in loader)
    waiting = torch.empty(0, len(schema.labels))
    for footer in footers:
        file = open_file(footer.path)
        for i, rows in enumerate(footer.row_group_rows):
            if not rows:
                continue
            parts = [waiting]
            while sum(len(p) for p in parts) < rows:
                parts.append(next(scores))
            logits, waiting = torch.cat(parts).tensor_split([rows])
            kept = {name: file.read_row_group(i, columns=[name]).column(0) for name in keep}
            yield pa.table({**kept, **score_columns(logits.numpy(), schema)})


@torch.no_grad()
def _score(model: Recommender, batch: Batch, device: torch.device) -> Tensor:
    """(B, T) logits on the host."""
    return model.logits(batch.to(device, non_blocking=True)).cpu()


def _write(out: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> int:
    """Writes a row group for each table and puts the file in its place when it is whole; returns its rows."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, rows = out.with_name(f".{out.name}.tmp"), 0
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for table in tables:
                writer.write_table(table, row_group_size=table.num_rows)
                rows += table.num_rows
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    return rows


def _main(arguments: Sequence[str]) -> None:
    if len(arguments) < 3 or any("=" in a for a in arguments[:3]):
        raise ConfigError([Complaint("arguments", "EXPORT, DATA and OUT come first, then key=value")])
    export, data, out = arguments[:3]
    complaints: list[Complaint] = []
    settings = parse(PredictSettings, overrides_mapping(arguments[3:]), complaints)
    if not complaints:
        complaints += settings.check()
    if "://" in out:
        complaints.append(Complaint("OUT", f"is '{out}'; only local files are written"))
    if complaints:
        raise ConfigError(complaints)
    result = run(Path(export), data, Path(out), settings)
    print(f"{result['rows']:,} rows in {result['seconds']:.1f} s on {result['device']} -> {out}")
    if result["data_policies"]:
        print(describe_policies(result["data_policies"]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.predict` and `dist-rec predict`."""
    run_entry(_main, arguments, USAGE)


if __name__ == "__main__":
    main()
