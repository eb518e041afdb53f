"""Scores a Parquet data set with an export: `dist-rec predict EXPORT DATA OUT [key=value ...]`, in one process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dist_rec.config import RunConfig, overrides_mapping, read
from dist_rec.data.batch import Batch
from dist_rec.data.footers import DataError, FileFooter, check_columns, open_file, read_footers
from dist_rec.data.ids import describe_policies
from dist_rec.data.item_table import ItemTable
from dist_rec.data.join import Join
from dist_rec.data.loader import Loader
from dist_rec.data.schema import Schema
from dist_rec.job import run_entry
from dist_rec.recommender import Recommender, served
from dist_rec.serving.exported import CONFIG, TENSORS, check_folder, load_tensors, scoring_sections
from dist_rec.serving.retrieval import INDEX, QUERY, VECTORS, Lists
from dist_rec.serving.scores import score_columns, score_names
from dist_rec.serving.tensor_file import TensorFileError
from dist_rec.settings import Complaint, ConfigError, gather, parse
from dist_rec.training.runtime import RunSettings, check_writable, keep_freed_memory

USAGE = """usage: dist-rec predict EXPORT DATA OUT [key=value ...]

Scores every row of DATA (a Parquet file, folder, glob or URI) with the export in folder EXPORT and writes them to OUT,
a Parquet file, in the order of DATA: logit_<label>, and probability_<label> for binary labels. DATA needs the columns
that the model reads and no others: no labels, no weights. One process, no process group, constant memory; on a CPU the
tables stay on disk and are read where they are used.

With two towers every row of DATA is a query, and OUT has the columns items and scores: the best items of the exported
catalogue, all of which are compared, and their inner products. Memory: all vectors of the catalogue.

  keep=[user_id,row]     columns of DATA to copy to OUT, before the scores
  overwrite=true         replace OUT if it exists
  batch_size=4096        rows per step; default: that of evaluation in training
  decode_threads=2       row groups decoded at the same time
  device=cpu             auto (default) takes a GPU that has room for the model, else the CPU
  items=items.parquet    the item table, where the model reads columns joined from it; default: that of training
  cache=.data/cache      where what is derived from it is kept
  k=10                   two towers: items of each list
  exclude=[history]      two towers: features of the query whose items are left out of its list, as far as the model
                         reads them: those that max_length cuts off stay
  search=index           two towers: ask the exported index instead of comparing with all items
"""


@dataclass
class PredictSettings:
    """What `dist-rec predict` takes as key=value."""

    keep: list[str] = field(default_factory=list)
    overwrite: bool = False
    batch_size: int | None = None
    decode_threads: int = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    items: str | None = None
    cache: str | None = None
    k: int = 10
    exclude: list[str] = field(default_factory=list)
    search: Literal["exact", "index"] = "exact"

    def check(self) -> Iterator[Complaint]:
        """Complaints about the settings themselves."""
        for name in ("batch_size", "decode_threads", "k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Complaint(name, f"is {value}; use at least 1")
        for name in {n for n in self.keep if self.keep.count(n) > 1}:
            yield Complaint("keep", f"names column '{name}' twice")


class Part(NamedTuple):
    """An exported model, or one of its towers, ready to score.

    Attributes:
        config: the plain one. schema: of the rows that it scores: the features, and the groups without which the model
            would not be itself.
    """

    config: RunConfig
    schema: Schema
    model: Recommender

    def loader(self, footers: list[FileFooter], batch_size: int | None, pin_memory: bool = False) -> Loader:
        """One pass over rows of `schema` in file order."""
        data, join = self.config.data, None
        if self.config.schema.items is not None and set(self.reads) - set(self.schema.sparse) - set(self.schema.dense):
            join = Join(self.config.schema, open_items(self.config), self.reads)
        return Loader(
            data, self.schema, footers, rank=0, world_size=1, seed=0, shuffle=False, epochs=1, join=join,
            batch_size=batch_size or data.eval_batch_size or data.batch_size, pin_memory=pin_memory,
        )  # fmt: skip

    @property
    def reads(self) -> list[str]:
        """The features and dense columns that the model reads."""
        return _reads(self.config)


def load_part(folder: Path, **data: Any) -> Part:
    """The export in `folder`, its tensors mapped into memory. data: settings to use in place of those of training.

    Raises TensorFileError, ConfigError if it is not whole or not of this version.
    """
    check_folder(folder)
    config = _config(folder)
    config = replace(config, data=replace(config.data, **data))
    model = served(config).eval()
    load_tensors(folder, model)
    return Part(config, _scoring_schema(config), model)


def open_items(config: RunConfig) -> ItemTable:
    """The item table of a config. Raises DataError if it is not there or does not fit the schema."""
    assert config.data.items is not None
    footers = read_footers(config.data.items)
    check_columns(footers, config.schema.of_items())
    return ItemTable(config.schema, footers, Path(config.data.cache))


def run(export: Path, data: str, out: Path, settings: PredictSettings) -> dict[str, Any]:
    """Scores `data` into `out`; returns rows, seconds, device and what the schema's policies did.

    Raises:
        ConfigError, TensorFileError, DataError: for what is wrong with arguments, export and columns before a row is
            read. `out` is complete or not there.
    """
    started = time.perf_counter()
    if out.is_dir() or (out.exists() and not settings.overwrite):
        raise ConfigError([Complaint("OUT", f"is '{out}', which exists; choose another file, or set overwrite=true")])
    if problems := list(check_writable(out.parent, "OUT")):
        raise ConfigError(problems)
    has_towers = (export / QUERY).is_dir()
    folder = export / QUERY if has_towers else export
    given = {"items": settings.items, "cache": settings.cache, "decode_threads": settings.decode_threads}
    part = load_part(folder, **{key: value for key, value in given.items() if value is not None})
    footers = read_footers(data)
    if os.path.realpath(out) in [os.path.realpath(footer.path) for footer in footers]:
        raise ConfigError([Complaint("OUT", f"is '{out}', which is a file of DATA; choose another file")])
    check_columns(footers, part.schema)
    device = _device(settings.device, (folder / TENSORS).stat().st_size)
    part.model.to(device)
    scorer: _Scores | _Lists = _Lists(part, _lists(part, export, settings, device)) if has_towers else _Scores(part)
    fields = [*_kept(footers, settings.keep, [field.name for field in scorer.fields]), *scorer.fields]
    loader = part.loader(footers, settings.batch_size, pin_memory=device.type == "cuda")
    try:
        answers = (scorer.answer(batch, batch.to(device, non_blocking=True)) for batch in loader)
        rows = _write(out, pa.schema(fields), _tables(answers, footers, settings.keep))
    finally:
        loader.close()
    seconds = time.perf_counter() - started
    return {"rows": rows, "seconds": seconds, "device": str(device), "data_policies": dict(loader.counts)}


class _Scores:
    """Logits, and probabilities of binary labels."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self.fields = [pa.field(name, pa.float32()) for name in score_names(part.config.schema)]

    @torch.no_grad()
    def answer(self, batch: Batch, there: Batch) -> pa.Table:
        """B rows of `fields`. batch: in host memory. there: on the model's device."""
        return pa.table(score_columns(self._part.model.logits(there).cpu().numpy(), self._part.config.schema))


class _Lists:
    """The best items for each query."""

    def __init__(self, part: Part, lists: Lists) -> None:
        self._part, self._lists, self.fields = part, lists, lists.fields

    @torch.no_grad()
    def answer(self, batch: Batch, there: Batch) -> pa.Table:
        """As `_Scores.answer`."""
        return self._lists.answer(self._part.model.represent(there, QUERY), batch)


def _lists(part: Part, export: Path, settings: PredictSettings, device: torch.device) -> Lists:
    items, sparse = part.config.schema.items, part.schema.sparse
    assert items is not None
    count = part.config.schema.sparse[items.feature].num_ids
    known = [n for n in part.reads if n in sparse and sparse[n].num_ids == count]
    for name in settings.exclude:
        if name not in known:
            text = f"names '{name}', which is no feature of the query tower with as many ids as there are items"
            raise ConfigError([Complaint("exclude", f"{text}; known: {', '.join(known) or 'none'}")])
    missing = [n for n in (VECTORS, *([INDEX] if settings.search == "index" else [])) if not (export / n).is_file()]
    if missing:
        text = f"{export} has no {missing[0]}; export the model again, for an index without export.index=none"
        raise TensorFileError(text)
    return Lists(export, settings.k, settings.search, settings.exclude, device)


def _reads(config: RunConfig) -> list[str]:
    """The features and dense columns of the model, in the schema's order."""
    schema = config.schema
    return config.model.reads(schema) if hasattr(config.model, "reads") else [*schema.sparse, *schema.dense]


def _config(export: Path) -> RunConfig:
    """What scores depend on, checked; the sections that only training reads have their defaults."""
    complaints: list[Complaint] = []
    config: RunConfig = parse(RunConfig, scoring_sections(read(str(export / CONFIG))), complaints)
    if not complaints:
        complaints += gather("schema", config.schema.check())
        complaints += gather("model", config.model.check(config.schema))
    if complaints:
        raise ConfigError([c.under(str(export / CONFIG)) for c in complaints])
    return config


def _scoring_schema(config: RunConfig) -> Schema:
    """The features of the rows, and the groups without which the model would not be itself."""
    schema = config.schema
    groups = {}
    for name, group in schema.groups.items():
        others = {n: g for n, g in schema.groups.items() if n != name}
        if list(config.model.check(replace(schema, groups=others))):
            groups[name] = group
    return replace(schema.of_rows(_reads(config)), labels={}, weight=None, groups=groups)


def _kept(footers: list[FileFooter], names: list[str], taken: list[str]) -> list[pa.Field]:
    """The columns to copy, as they are in every file. taken: names of the columns of scores."""
    fields = []
    for name in names:
        if name in taken:
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


def _tables(answers: Iterator[pa.Table], footers: list[FileFooter], keep: list[str]) -> Iterator[pa.Table]:
    """One table for each row group of the data that has rows, in their order. answers: of one batch after the other."""
    waiting: pa.Table | None = None
    for footer in footers:
        file = open_file(footer.path)
        for i, rows in enumerate(footer.row_group_rows):
            if not rows:
                continue
            parts = [] if waiting is None else [waiting]
            while sum(p.num_rows for p in parts) < rows:
                parts.append(next(answers))
            scores = pa.concat_tables(parts)
            scores, waiting = scores.slice(0, rows), scores.slice(rows)
            kept = {name: file.read_row_group(i, columns=[name]).column(0) for name in keep}
            yield pa.table({**kept, **{name: scores.column(name) for name in scores.column_names}})


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
