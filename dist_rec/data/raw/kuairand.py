"""KuaiRand-1K (Gao et al. 2022, arXiv 2208.08696): a month of short videos shown to 1,000 users in the tabs of an app.

Files expected in RAW or RAW/data, plain or gzip, each with a header; columns in any order, more are ignored:

- log_standard_4_08_to_4_21_1k.csv and log_standard_4_22_to_5_08_1k.csv: user_id, video_id, date (YYYYMMDD), hourmin,
  is_click, is_like, long_view, duration_ms, tab (0 .. 14).
- log_random_4_22_to_5_08_1k.csv, if it is there: the same; videos that were shown at random.
- user_features_1k.csv: user_id, user_active_degree, is_lowactive_period, is_live_streamer, is_video_author, and
  number and range of follow_user_num, fans_user_num, friend_user_num, register_days, onehot_feat0 .. onehot_feat17.
- video_features_basic_1k.csv: video_id, author_id, video_type, upload_type, visible_status, music_id, music_type,
  tag.

video_features_statistic_1k.csv is not read: its means are over the whole month, test days included.

Domains: the five tabs with the most rows, in the order of their numbers, as the Scenario-Wise-Rec benchmark has them;
rows of other tabs are left out. That benchmark counts 2,407,352, 7,760,237, 895,385, 402,366 and 183,403 rows. Label:
`is_click`; `is_like` and `long_view` are written too, and a config declares one with schema.labels.is_like={}.

Split, by time: the first days with 80 % of the rows of these tabs are training, those up to 90 % validation, the rest
test. The random log is a split of its own, `random`, which no model should be trained on. (The benchmark splits at
random.)

Memory: users and videos, some 90 bytes for each of 4.4 million videos.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_rec.data.footers import DataError
from dist_rec.data.raw_log import LEFT_OUT, Block, Days, Lookup, RawLog, codes
from dist_rec.data.text_files import Rows, TextFile, find, find_optional

STANDARD = ("log_standard_4_08_to_4_21_1k.csv", "log_standard_4_22_to_5_08_1k.csv")
RANDOM = "log_random_4_22_to_5_08_1k.csv"
NUM_DOMAINS = 5
USER_TEXT = (
    "user_active_degree", "follow_user_num_range", "fans_user_num_range", "friend_user_num_range",
    "register_days_range",
)  # fmt: skip
USER_IDS = ("is_lowactive_period", "is_live_streamer", "is_video_author", *(f"onehot_feat{i}" for i in range(18)))
USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
VIDEO_TEXT = ("video_type", "upload_type")
VIDEO_IDS = ("author_id", "visible_status", "music_id", "music_type")
STANDARD_ROWS, RANDOM_ROWS = 11_713_045, 43_028
_LABELS = ("is_click", "is_like", "long_view")


def open_log(raw: Path) -> RawLog:
    """The logs in folder `raw`; reads them once, for the rows of each day and tab, and holds users and videos."""
    standard = [find(raw, name) for name in STANDARD]
    random = find_optional(raw, RANDOM)
    users, videos = _users(find(raw, "user_features_1k.csv")), _videos(find(raw, "video_features_basic_1k.csv"))
    per_day_and_tab: Counter[tuple[int, int]] = Counter()
    for path in standard:
        for rows in _log(path, {"date": pa.int64(), "tab": pa.int64()}):
            pairs, counts = np.unique(np.stack([_date(rows), rows.numbers("tab")]), axis=1, return_counts=True)
            per_day_and_tab.update(dict(zip(map(tuple, pairs.T.tolist()), counts.tolist(), strict=True)))
    tabs, days = _tabs_and_days(per_day_and_tab, standard[-1])
    return RawLog(
        about=f"KuaiRand-1K; tabs {', '.join(map(str, tabs))} are domains 0 to {len(tabs) - 1}; training up to "
        f"{days.train}, validation up to {days.validation}, test after it; rows of other tabs are left out.",
        blocks=lambda: _blocks(standard, random, users, videos, tabs, days),
        labels=("is_click",),
        sparse=("user_id", "video_id", *USER_TEXT, *USER_IDS, *VIDEO_TEXT, *VIDEO_IDS, "tag"),
        dense=(*USER_NUMBERS, "duration_ms"),
        numbered={"hour": 24, "domain": len(tabs)},
        groups={"domain": "domain", "user": "user"},
        others=("is_like", "long_view"),
        splits=("train", "validation", "test", *(["random"] if random else [])),
        rows=STANDARD_ROWS + (RANDOM_ROWS if random else 0),
    )


def _tabs_and_days(rows: Counter[tuple[int, int]], path: Path) -> tuple[list[int], Days]:
    """The largest tabs by number, and the split of their days."""
    per_tab, per_day = Counter[int](), Counter[int]()
    for (_, tab), count in rows.items():
        per_tab[tab] += count
    tabs = sorted(tab for tab, _ in sorted(per_tab.items(), key=lambda item: (-item[1], item[0]))[:NUM_DOMAINS])
    if len(tabs) < 2:
        raise DataError(f"{path}: all rows have tab {tabs[0]}; several domains need several tabs; is the file whole?")
    for (day, tab), count in rows.items():
        if tab in tabs:
            per_day[day] += count
    return tabs, Days.of(per_day, path)


def _blocks(
    standard: list[Path], random: Path | None, users: Lookup, videos: Lookup, tabs: list[int], days: Days
) -> Iterator[Block]:
    kinds = {name: pa.int64() for name in ("user_id", "video_id", "date", "hourmin", "tab", "duration_ms")}
    kinds |= dict.fromkeys(_LABELS, pa.int8())
    for path in [*standard, *([random] if random else [])]:
        for rows in _log(path, kinds):
            tab, user = rows.numbers("tab"), rows.numbers("user_id")
            split = np.full(len(tab), 3, np.int8) if path == random else days.split(_date(rows))
            hour = rows.numbers("hourmin") // 100
            rows.refuse((hour < 0) | (hour > 23), "hourmin", "HHMM")
            columns = {name: rows.binary(name) for name in _LABELS}
            columns |= {"user": pa.array(user), "user_id": pa.array(user), "video_id": rows.column("video_id")}
            columns |= {"hour": pa.array(hour), "duration_ms": rows.column("duration_ms")}
            columns["domain"] = pa.array(np.searchsorted(tabs, tab).clip(max=len(tabs) - 1))
            columns |= users.take(user, (*USER_TEXT, *USER_IDS, *USER_NUMBERS))
            columns |= videos.take(rows.numbers("video_id"), (*VIDEO_TEXT, *VIDEO_IDS, "tag"))
            yield Block(np.where(np.isin(tab, tabs), split, np.int8(LEFT_OUT)), columns)


def _log(path: Path, kinds: dict[str, pa.DataType]) -> Iterator[Rows]:
    return TextFile(path, kinds, empty={"duration_ms"} & set(kinds)).batches()


def _date(rows: Rows) -> np.ndarray:
    """(n,) YYYYMMDD."""
    date = rows.numbers("date")
    rows.refuse((date < 20_220_101) | (date > 20_221_231), "date", "YYYYMMDD in 2022")
    return date


def _users(path: Path) -> Lookup:
    kinds = {"user_id": pa.int64(), **dict.fromkeys(USER_TEXT, pa.string())}
    # numbers that may be missing are written as 3.0
    kinds |= dict.fromkeys((*USER_IDS, *USER_NUMBERS), pa.float64())
    users = Lookup.read(TextFile(path, kinds, empty=set(kinds) - {"user_id"}, quotes=True).batches(), "user_id")
    for name in USER_TEXT:
        users.replace(name, codes(users.column(name)))
    for name in USER_IDS:
        users.to_integers(name, path)
    return users


def _videos(path: Path) -> Lookup:
    kinds = {"video_id": pa.int64(), **dict.fromkeys((*VIDEO_TEXT, "tag"), pa.string())}
    kinds |= dict.fromkeys(VIDEO_IDS, pa.float64())
    videos = Lookup.read(TextFile(path, kinds, empty=set(kinds) - {"video_id"}, quotes=True).batches(), "video_id")
    for name in VIDEO_TEXT:
        videos.replace(name, codes(videos.column(name)))
    for name in VIDEO_IDS:
        videos.to_integers(name, path)
    videos.replace("tag", _tags(videos.column("tag"), path))
    return videos


def _tags(text: pa.Array, path: Path) -> pa.ListArray:
    """(n,) "12,65" -> (n,) lists of tags; no tag is an empty list."""
    lists = pc.split_pattern(text, ",")
    offsets = np.concatenate([[0], np.cumsum(pc.fill_null(pc.list_value_length(lists), 0))]).astype(np.int32)
    try:
        return pa.ListArray.from_arrays(offsets, lists.flatten().cast(pa.int64()))
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: column 'tag' should hold numbers with commas between them, but {error}") from error
