"""Avazu click-through rate prediction (Kaggle), ten days of mobile ads.

File expected in RAW: train.csv or train, plain or gzip (Kaggle calls it train.gz). Its test file has no labels and is
not read. A header with the columns id, click, hour (YYMMDDHH), C1, banner_pos, site_id, site_domain, site_category,
app_id, app_domain, app_category, device_id, device_ip, device_model, device_type, device_conn_type, C14 .. C21, in
any order; more columns are ignored. Values are hexadecimal in the columns of sites, apps, device_id, device_ip and
device_model, and integers in the others. `id` is not read; the hour becomes `hour` (of the day) and `weekday` (0 is
Monday).

Split, by time: the first days with 80 % of the rows are training, those up to 90 % validation, the rest test; of the
published ten days, 21 to 28 October, 29 and 30.

Memory: only the ids (`device_ip` has some 6.7 million: see --max-ids).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dist_rec.data.raw_log import Block, Days, RawLog
from dist_rec.data.text_files import Rows, TextFile, find

HEXADECIMAL = (
    "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category", "device_id", "device_ip",
    "device_model",
)  # fmt: skip
INTEGERS = ("C1", "banner_pos", "device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22)))
PUBLISHED_ROWS = 40_428_967


def open_log(raw: Path) -> RawLog:
    """The log in folder `raw`; reads it once, for the rows of each day."""
    path = find(raw, "train.csv", "train")
    per_day: Counter[int] = Counter()
    for rows in TextFile(path, {"hour": pa.int64()}).batches():
        days, counts = np.unique(_day(rows), return_counts=True)
        per_day.update(dict(zip(days.tolist(), counts.tolist(), strict=True)))
    split = Days.of(per_day, path)
    return RawLog(
        about=f"Avazu; training up to day {split.train} (YYMMDD), validation up to {split.validation}, test after it.",
        blocks=lambda: _blocks(path, split),
        labels=("click",),
        sparse=(*HEXADECIMAL, *INTEGERS),
        numbered={"hour": 24, "weekday": 7},
        rows=PUBLISHED_ROWS,
    )


def _day(rows: Rows) -> np.ndarray:
    """(n,) YYMMDD of each row."""
    hours = rows.numbers("hour")
    day, month = hours // 100, hours // 10_000 % 100
    good = (hours % 100 < 24) & (month >= 1) & (month <= 12) & (hours >= 0) & (hours < 10**8)
    # day 0 and the 31st of a short month lie in the month beside it
    good &= _dates(day).astype("datetime64[M]") == _months(day)
    rows.refuse(~good, "hour", "YYMMDDHH")
    return day


def _blocks(path: Path, days: Days) -> Iterator[Block]:
    kinds = {"click": pa.int8(), "hour": pa.int64(), **dict.fromkeys(HEXADECIMAL, pa.string())}
    for rows in TextFile(path, kinds | dict.fromkeys(INTEGERS, pa.int64()), empty={*HEXADECIMAL, *INTEGERS}).batches():
        day = _day(rows)
        columns = {"click": rows.binary("click"), "hour": pa.array(rows.numbers("hour") % 100)}
        columns["weekday"] = pa.array(_weekday(day))
        columns |= {name: rows.hexadecimal(name) for name in HEXADECIMAL}
        yield Block(days.split(day), columns | {name: rows.column(name) for name in INTEGERS})


def _months(day: np.ndarray) -> np.ndarray:
    """(n,) YYMMDD -> (n,) months, datetime64[M]."""
    return ((day // 10_000 + 30) * 12 + day // 100 % 100 - 1).astype("datetime64[M]")


def _dates(day: np.ndarray) -> np.ndarray:
    """(n,) YYMMDD -> (n,) datetime64[D]."""
    return _months(day).astype("datetime64[D]") + (day % 100 - 1)


def _weekday(day: np.ndarray) -> np.ndarray:
    """(n,) YYMMDD -> (n,) 0 .. 6, 0 is Monday."""
    return (_dates(day).astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday
