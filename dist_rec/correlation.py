"""How much the columns of an item table say about each other: `dist-rec correlation ITEMS OUT [id=COLUMN] ...`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import yaml

from dist_rec.data.footers import FileFooter, is_list, read_footers
from dist_rec.data.mutual_information import Information, mutual_information
from dist_rec.job import run_entry
from dist_rec.settings import Complaint, ConfigError
from dist_rec.training.runtime import check_writable

USAGE = """usage: dist-rec correlation ITEMS OUT [id=COLUMN] [columns=COLUMN,COLUMN,...]

Computes the mutual information of the item table's columns, for auxiliary.contrastive with masking: cfm, and writes
OUT, a piece of config with the matrix in it: list OUT under `base` of your config. The config of a run then holds the
matrix that it was trained with. Memory does not grow with the table.

  ITEMS                  the item table: a Parquet file, folder, glob or URI
  id=item_id             its column of ids (default: item_id)
  columns=brand,words    the other columns (default: all with integers or lists of integers)

Definition, bucketing and correction of the bias: dist_rec/data/mutual_information.py.
"""

FEWEST = 3


def run(items: str, out: str, key: str = "item_id", columns: Sequence[str] | None = None) -> Information:
    """Computes, prints and writes to `out`; at least FEWEST columns are needed, the ids among them.

    Raises:
        ConfigError: columns that are not there or hold no integers, or too few of them, or `out` cannot be written.
        DataError: bad files.
    """
    path = Path(out)
    if path.is_dir():
        raise ConfigError([Complaint("OUT", f"is '{out}', which is a folder; name a file")])
    if problems := list(check_writable(path.parent, "OUT")):
        raise ConfigError(problems)
    footers = read_footers(items)
    found = mutual_information(footers, key, _columns(footers[0], key, columns))
    print(_table(found))
    path.parent.mkdir(parents=True, exist_ok=True)
    rounded = {a: {b: round(value, 6) for b, value in row.items()} for a, row in found.information.items()}
    head = [
        f"# Mutual information in nats of the columns of {items}, {found.rows:,} items: dist-rec correlation.",
        f"# Values in {found.buckets} buckets, hashed in: {', '.join(found.hashed) or 'none'}; adjusted for chance.",
    ]
    settings = yaml.safe_dump({"auxiliary": {"contrastive": {"correlation": rounded}}}, sort_keys=False)
    path.write_text("\n".join([*head, settings]))
    print(f"written to {out}: list it under `base` of a config")
    return found


def _columns(footer: FileFooter, key: str, wanted: Sequence[str] | None) -> dict[str, bool]:
    """The columns other than the ids, and whether each is a list."""
    usable = {f.name: is_list(f.type) for f in footer.arrow_schema if _holds_integers(f.type)}
    complaints = []
    for argument, name in (("id", key), *(("columns", name) for name in wanted or ())):
        if name not in usable or (argument == "id" and usable[name]):
            close = difflib.get_close_matches(name, usable, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"columns with integers: {', '.join(usable) or 'none'}"
            what = "column of single integers" if argument == "id" else "column of integers or lists of integers"
            complaints.append(Complaint(argument, f"is '{name}', which is no {what} of {footer.path}; {hint}"))
    columns = {n: multi for n, multi in usable.items() if n != key and (wanted is None or n in wanted)}
    if not complaints and 1 + len(columns) < FEWEST:
        have = ", ".join([key, *columns])
        text = (
            f"are {have}: correlated masking needs at least {FEWEST}, the ids among them, as with 2 one view would mask"
        )
        complaints.append(Complaint("columns", f"{text} both; add a column to the item table, or use masking: rfm"))
    if complaints:
        raise ConfigError(complaints)
    return columns


def _holds_integers(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind.value_type if is_list(kind) else kind)


def _table(found: Information) -> str:
    names = list(found.information)
    width = max(map(len, names)) + 2
    lines = ["nats".ljust(width) + "".join(name.rjust(max(width, 10)) for name in names)]
    for a in names:
        cells = [f"{found.information[a].get(b, found.entropy.get(a, float('nan'))):.4f}" for b in names]
        lines.append(a.ljust(width) + "".join(cell.rjust(max(width, 10)) for cell in cells))
    return "\n".join([*lines, "on the diagonal: entropy (of the ids: the logarithm of their number is not shown)"])


def _main(arguments: Sequence[str]) -> None:
    paths = [a for a in arguments if "=" not in a]
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    complaints = [
        Complaint(key, "is no option; options: id, columns") for key in options if key not in ("id", "columns")
    ]
    if len(paths) != 2:
        complaints.append(Complaint("arguments", f"are {paths}; give ITEMS and OUT"))
    if complaints:
        raise ConfigError(complaints)
    columns = options["columns"].split(",") if "columns" in options else None
    run(paths[0], paths[1], options.get("id", "item_id"), columns)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.correlation` and `dist-rec correlation`."""
    run_entry(_main, arguments, USAGE)


if __name__ == "__main__":
    main()
