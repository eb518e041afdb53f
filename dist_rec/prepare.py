"""Turns the raw files of a public data set into Parquet with a schema: `dist-rec prepare NAME RAW OUT`."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from dist_rec.data import prepared, raw
from dist_rec.data.footers import DataError
from dist_rec.job import run_entry

USAGE = """usage: dist-rec prepare NAME RAW OUT [--max-ids N]

Reads the raw files of a public data set in folder RAW and writes OUT/train, OUT/validation and OUT/test (Parquet),
OUT/counts.json, and OUT/schema.yaml, a config that an experiment card names as its `base:`. Everything is streamed;
a file that is missing, wrong or cut short ends it with the file, the line, what was found and what was expected.

NAME           {names}
RAW            the folder with the files as they were published, plain or gzip
OUT            the folder to make
--max-ids N    values of a column that get an id of their own (default {max_ids}); a column with more is hashed to N ids

dist-rec prepare NAME --help     the files and columns it expects, and how it splits
"""


def names() -> list[str]:
    """The data sets: one per file in `dist_rec/data/raw`, called by the file's name."""
    return sorted(module.name for module in pkgutil.iter_modules(raw.__path__))


def load(name: str) -> ModuleType:
    """The module of a data set, which has `open_log`; DataError for a name that is none."""
    if name not in names():
        raise DataError(f"'{name}' is no data set that can be prepared; choose one of {', '.join(names())}")
    return importlib.import_module(f"{raw.__name__}.{name}")


def _usage() -> str:
    return USAGE.format(names=", ".join(names()), max_ids=prepared.MAX_IDS)


def _main(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    log = load(options.name).open_log(options.raw)
    counts = prepared.prepare(log, options.out, options.max_ids)
    print(_summary(log.about, counts, options.out))


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("name")
    parser.add_argument("raw", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-ids", type=_count, default=prepared.MAX_IDS)
    return parser.parse_args(list(arguments))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SystemExit(f"error: {message}\n{_usage().splitlines()[0]}\nsee dist-rec prepare --help")


def _count(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"is '{text}'; expected a whole number >= 1")
    return number


def _summary(about: str, counts: dict[str, Any], out: Path) -> str:
    lines = [about, f"{counts['rows_read']:,} rows read, {counts['rows_left_out']:,} left out"]
    for name, split in counts["splits"].items():
        rates = ", ".join(f"{label} {rate:.4f}" for label, rate in split["positives"].items())
        lines.append(f"  {name:<12}{split['rows']:>14,} rows   {rates}")
        if "rows_by_domain" in split:
            lines.append(
                "  " + " " * 12 + "by domain: " + ", ".join(f"{n:,}" for n in split["rows_by_domain"].values())
            )
    if counts["hashed"]:
        lines.append(f"hashed, as they have more values than --max-ids: {', '.join(counts['hashed'])}")
    return "\n".join([*lines, f"next: a config with `base: {out / 'schema.yaml'}` and a model"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.prepare` and `dist-rec prepare`."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    of_one = [name for name in arguments[:1] if name in names() and {"-h", "--help"} & set(arguments)]
    run_entry(_main, arguments, f"{load(of_one[0]).__doc__}" if of_one else _usage())


if __name__ == "__main__":
    main()
