"""Writes a commented starting config for a Parquet data set: `dist-rec init DATA -o CONFIG`."""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import yaml

from dist_rec.config import load
from dist_rec.data.footers import DataError, check_columns, find_files, read_footers, split_options
from dist_rec.data.guess import Entry, Guess, guess
from dist_rec.data.profile import Profile, profile
from dist_rec.data.schema import SparseColumn
from dist_rec.job import run_entry
from dist_rec.training.checkpoint import CheckpointConfig

USAGE = """usage: dist-rec init DATA -o CONFIG [--label NAME] [--sample-rows N] [--force]

Writes a commented YAML config that trains a DLRM on a Parquet data set: what each column probably is, table sizes,
pooling factors, nulls, scaling, splits. It is a start: read its comments and correct what is guessed wrong.

DATA               a file, folder or glob, local or a URI (s3://bucket/data). A folder with train/ in it (or
                   train.parquet), and perhaps validation/ and test/, gives these splits
-o, --output FILE  the config to write
--label NAME       the label, a column of 0s and 1s; without it: one called label, click, target, ..., or the only such
--sample-rows N    rows to read, spread over all files (default 200000); bounds come from the footers of all files
--force            overwrite FILE

Then: dist-rec plan FILE ranks=8, dist-rec train FILE, or on several ranks
torchx run -s local_cwd launch/components.py:train --config FILE --ranks 2
"""

DIM = 16
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing", "holdout"),
}
_STEPS = 200  # per epoch on two ranks, at least, where rows are few
_MIN_BATCH, _MAX_BATCH = 32, 4096
_WIDTH = 120
_MIB = 2**20


@dataclass
class Splits:
    """Paths for `data.train`, `data.validation`, `data.test`."""

    train: str
    validation: str | None = None
    test: str | None = None

    @property
    def others(self) -> list[str]:
        """Paths of the splits that are not train."""
        return [path for path in (self.validation, self.test) if path is not None]


def _main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    output = Path(options.output)
    _check_output(output, options.force)
    splits = find_splits(options.data)
    train = read_footers(splits.train)
    others = [footer for path in splits.others for footer in read_footers(path)]
    measured = profile(train, options.sample_rows, others)
    guessed = guess(measured, options.label)
    check_columns([*train, *others], guessed.schema)
    text = "\n".join(_lines(options.data, output, splits, measured, guessed)) + "\n"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
    except OSError as error:
        raise DataError(f"{output}: cannot be written ({error.strerror}); choose another place with -o") from error
    load(str(output))  # says at once what a run would complain about
    print(_summary(output, splits, guessed))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--label")
    parser.add_argument("--sample-rows", type=_rows, default=200_000)
    parser.add_argument("--force", action="store_true")
    parser.add_argument("-h", "--help", action="help")
    return parser.parse_args(list(arguments))


class _Parser(argparse.ArgumentParser):
    def format_help(self) -> str:
        return USAGE

    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"error: {message}\n{USAGE.splitlines()[0]}\nsee dist-rec init --help")


def _rows(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"is '{text}'; expected a whole number >= 1")
    return number


def _check_output(output: Path, force: bool) -> None:
    if output.is_dir():
        raise DataError(f"{output}: is a folder; name a file, e.g. -o {output / 'config.yaml'}")
    if output.exists() and not force:
        raise DataError(f"{output}: exists already; choose another name, or overwrite it with --force")


def find_splits(data: str) -> Splits:
    """The splits in a folder that has train/ or train.parquet in it, and else all of `data` as the training split.

    Raises DataError if `data` names no file.
    """
    base, options = split_options(data)  # of a URI: every file has them too
    files, folder = find_files(data), base.rstrip("/") + "/"
    inside = [split_options(name)[0][len(folder) :] for name in files if name.startswith(folder)]
    found: dict[str, str] = {}
    for split, names in _SPLITS.items():
        for name in names:
            if any(file.startswith(f"{name}/") for file in inside):
                found.setdefault(split, f"{folder}{name}{options}")
            if f"{name}.parquet" in inside:
                found.setdefault(split, f"{folder}{name}.parquet{options}")
    return Splits(**found) if "train" in found else Splits(data)


def _lines(data: str, output: Path, splits: Splits, measured: Profile, guessed: Guess) -> Iterator[str]:
    features = len(guessed.schema.sparse) + bool(guessed.schema.dense)
    model = "dlrm" if features > 1 else "dcn"
    yield from _card(model, data, output, measured, guessed)
    yield f"run: {{dir: {_scalar('runs/' + output.stem)}}}"
    yield ""
    batch_size = _batch_size(measured.rows)
    yield from _data_section(splits, batch_size, guessed)
    yield ""
    yield from _schema_section(guessed)
    yield ""
    yield from _model_section(model)
    yield from _training_section(splits, measured.rows, batch_size, guessed)


def _card(model: str, data: str, output: Path, measured: Profile, guessed: Guess) -> Iterator[str]:
    papers = {
        "dlrm": "DLRM (Naumov et al. 2019, arXiv 1906.00091)",
        "dcn": "DCN-V2 (Wang et al. 2021, arXiv 2008.13535)",
    }
    total = sum(_table_bytes(c) for c in guessed.schema.sparse.values())
    what = "all rows were read" if measured.is_whole else f"{measured.sample.num_rows:,} of them were read"
    files = f"{measured.files} file{'s' * (measured.files > 1)} with {measured.row_groups} row groups"
    yield f"# Method      {papers[model]}, files: dist_rec/models/{model}.py"
    yield f"# Data        {_one_line(data)}"
    yield f"#             {measured.rows:,} training rows in {files}; {what}"
    yield f"# Hardware    CPU ranks or GPUs; tables {_mib(total)} with dim {DIM}, without optimiser state"
    config = _one_line(str(output))
    yield f"# Command     dist-rec train {config}"
    yield f"#             torchx run -s local_cwd launch/components.py:train --config {config} --ranks 2"
    yield "# Written by  dist-rec init: a start. Every comment says what was found; correct what was guessed wrong."
    for warning in guessed.warnings:
        yield from _comment(f"DECIDE      {warning}", "")


def _data_section(splits: Splits, batch_size: int, guessed: Guess) -> Iterator[str]:
    yield "data:"
    yield f"  train: {_scalar(splits.train)}"
    for split in ("validation", "test"):
        path = getattr(splits, split)
        yield f"  {split}: {_scalar(path)}" if path else f"  # {split}: PATH  # none was found"
    if not splits.others:
        by = [e.name for e in guessed.entries if "by its name it says which split" in e.left_out]
        times = [e.name for e in guessed.entries if e.left_out.startswith(("a time", "is a time"))]
        how = (
            f"by column '{by[0]}'"
            if by
            else f"by time (column '{times[0]}')"
            if times
            else "by time, or else at random"
        )
        yield from _comment(
            f"No validation set: nothing would show overfitting. Split the rows {how}, e.g. 80/10/10, into train/, "
            "validation/ and test/ of one folder, and run init on that folder.",
            "  ",
        )
    yield f"  batch_size: {batch_size}  # rows per rank and step"


def _schema_section(guessed: Guess) -> Iterator[str]:
    schema, notes = guessed.schema, guessed.notes
    yield "schema:"
    yield "  labels:"
    yield from _line(f"{_key(guessed.label)}: {_mapping(schema.labels[guessed.label])}", notes["label"], "    ")
    for kind, title in (
        ("dense", "dense:  # used as (t(x) - mean) / std"),
        ("sparse", "sparse:  # the ids found; the table: rows x dim, size"),
    ):
        entries = [e for e in guessed.entries if e.column is not None and (kind == "sparse") == _is_sparse(e)]
        if any(not e.left_out for e in entries):
            yield f"  {title}"
        elif entries:
            yield f"  # {kind}:"
        for entry in entries:
            yield from _entry_lines(entry)
    yield from _comment(
        "Columns that hold ids of the same things can share a table: give them one name, table: NAME.", "    "
    )
    if schema.weight is not None:
        yield from _line(f"weight: {_mapping(schema.weight)}", notes["weight"], "  ")
    if schema.groups:
        yield "  groups:"
        for name, group in schema.groups.items():
            yield from _line(f"{name}: {_mapping(group)}", notes[name], "    ")
    unreadable = [e for e in guessed.entries if e.column is None]
    if unreadable:
        yield "  # Left out:"
        for entry in unreadable:
            yield from _comment(f"  {_one_line(entry.name)}: {entry.left_out}", "  ")


def _entry_lines(entry: Entry) -> Iterator[str]:
    assert entry.column is not None
    note = entry.note
    if isinstance(entry.column, SparseColumn):
        note += f"; {entry.column.num_rows:,} x {DIM}, {_mib(_table_bytes(entry.column))}"
    text = f"{_key(entry.name)}: {_mapping(entry.column)}"
    if entry.left_out:
        yield from _line(f"# {text}", f"LEFT OUT, {entry.left_out} ({note})", "    ")
    else:
        yield from _line(text, note, "    ")


def _model_section(model: str) -> Iterator[str]:
    shape = "bottom: [64], top: [128, 64]" if model == "dlrm" else "cross_layers: 2, deep: [128, 64]"
    yield f"model: {{name: {model}, dim: {DIM}, {shape}}}  # dim: width of every embedding"
    yield "optim:"
    yield "  tables: {name: rowwise_adagrad, lr: 0.02}"
    yield "  dense: {name: adagrad, lr: 0.01}"


def _training_section(splits: Splits, rows: int, batch_size: int, guessed: Guess) -> Iterator[str]:
    steps = math.ceil(rows / batch_size)
    yield f"train: {{epochs: 1}}  # {steps:,} steps on one rank, half of them on two"
    if splits.validation is not None:
        every = max(1, steps // 8)
        yield f"  # instead: {{epochs: 3, eval_every: {every}, early_stopping: {{metric: ne, patience: 2}}}}"
    metrics = []
    if guessed.by:
        metrics.append(f"by: [{', '.join(guessed.by)}]")
    if guessed.grouped_auc:
        metrics.append(f"grouped_auc: [{', '.join(guessed.grouped_auc)}]")
    if metrics:
        yield f"metrics: {{{', '.join(metrics)}}}"
    between = CheckpointConfig().every
    yield f"checkpoint: {{every: {between}}}  # steps; a run that is started again goes on from its newest checkpoint"
    yield f"report: {{every: {min(100, max(1, steps // 20))}}}  # steps"


def _batch_size(rows: int) -> int:
    power = 2 ** math.floor(math.log2(max(rows / _STEPS / 2, 1)))
    return min(max(power, _MIN_BATCH), _MAX_BATCH)


def _key(name: str) -> str:
    """A name as a key of a YAML mapping, quoted where it has to be."""
    if not name.isprintable():
        return json.dumps(name)  # YAML's own quotes may break a line, which a key cannot
    listed = yaml.safe_dump([name], allow_unicode=True, width=math.inf, default_flow_style=True)
    return listed.strip()[1:-1]


def _scalar(value: Any) -> str:
    """A value in YAML that reads back as the same value; text is kept from omegaconf's interpolation."""
    if isinstance(value, str):
        return _key(value.replace("${", "\\${"))
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def _mapping(column: Any) -> str:
    """The fields of a dataclass that differ from their default."""
    values = asdict(column)
    changed = {f.name: values[f.name] for f in fields(column) if values[f.name] != f.default}
    return "{" + ", ".join(f"{name}: {_scalar(value)}" for name, value in changed.items()) + "}"


def _line(text: str, note: str, indent: str) -> Iterator[str]:
    """`text` with `note` behind it, or above it where both do not fit in a line."""
    whole = f"{indent}{text}  # {_one_line(note)}"
    if len(whole) <= _WIDTH:
        yield whole
    else:
        yield from _comment(note, indent)
        yield f"{indent}{text}"


def _comment(text: str, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(
        _one_line(text), _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ", break_on_hyphens=False
    )


def _one_line(text: str) -> str:
    """Names may hold line breaks, which would end a comment."""
    return " ".join(text.split()) if not text.isprintable() else text


def _is_sparse(entry: Entry) -> bool:
    return isinstance(entry.column, SparseColumn)


def _table_bytes(column: SparseColumn) -> int:
    return 4 * column.num_rows * DIM


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB" if size >= _MIB / 20 else f"{size / 1024:,.1f} KiB"


def _summary(output: Path, splits: Splits, guessed: Guess) -> str:
    schema = guessed.schema
    total = sum(_table_bytes(c) for c in schema.sparse.values())
    lines = [
        f"wrote {output}: label {guessed.label}, {len(schema.dense)} dense, {len(schema.sparse)} sparse columns, "
        f"tables {_mib(total)} with dim {DIM}"
    ]
    if left := [f"  {e.name}: {e.left_out}" for e in guessed.entries if e.left_out]:
        lines += ["left out:", *left]
    lines += [f"decide: {warning}" for warning in guessed.warnings]
    if splits.validation is None:
        lines.append("no validation split was found; the config says how to make one")
    return "\n".join([*lines, f"read its comments, then: dist-rec train {output}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.init` and `dist-rec init`."""
    run_entry(_main, arguments, USAGE)


if __name__ == "__main__":
    main()
