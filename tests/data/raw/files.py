"""Small raw files in the formats of the public data sets. Each writer also returns the rows it wrote, as plain values.

Everything is drawn from a seed; nothing is taken from the real files.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
"""Column -> value; None where it is missing."""


def text(path: Path, lines: Iterable[str], encoding: str = "utf-8") -> None:
    """Writes lines, compressed if the name ends in .gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def table(path: Path, rows: Sequence[Row], quoting: int = csv.QUOTE_MINIMAL) -> None:
    """A csv file with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), quoting=quoting, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    text(path, buffer.getvalue().splitlines())


def criteo(path: Path, rows: int, seed: int = 0) -> list[Row]:
    """train.txt, or a day_*."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(rows):
        dense = [int(v) if rng.random() > 0.2 else None for v in rng.integers(-2, 500, 13)]
        sparse = [f"{v * 2654435761 % 2**32:08x}" if rng.random() > 0.1 else None for v in rng.integers(0, 30, 26)]
        row = {"label": int(rng.random() < 0.3)}
        row |= {f"i{i + 1}": v for i, v in enumerate(dense)} | {f"c{i + 1}": v for i, v in enumerate(sparse)}
        result.append(row)
    text(path, ("\t".join("" if v is None else str(v) for v in row.values()) for row in result))
    return result


def avazu(path: Path, rows: int, days: int = 10, seed: int = 0) -> list[Row]:
    """train.gz, in the order of time."""
    rng = np.random.default_rng(seed)
    hexadecimal = ["site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"]
    hexadecimal += ["device_id", "device_ip", "device_model"]
    result: list[Row] = []
    for i in range(rows):
        day, hour = 21 + i * days // rows, int(rng.integers(0, 24))
        row: Row = {"id": 2**63 + i, "click": int(rng.random() < 0.3), "hour": f"1410{day:02d}{hour:02d}", "C1": 1005}
        row |= {"banner_pos": int(rng.integers(0, 3))}
        row |= {name: f"{rng.integers(0, 20) * 2654435761 % 2**32:08x}" for name in hexadecimal}
        row |= {"device_type": 1, "device_conn_type": 0}
        row |= {f"C{n}": int(rng.integers(-1, 15)) for n in range(14, 22)}
        result.append(row)
    table(path, result)
    return result


def movielens_100k(folder: Path, rows: int, seed: int = 0) -> tuple[list[Row], dict[int, Row], dict[int, list[int]]]:
    """u.data, u.user, u.item: (ratings, users, genres of movies)."""
    ratings, users = _ratings(rows, seed), _users(seed)
    genres = {m: sorted({m % 19, m * 7 % 19}) for m in range(1, 41)}
    text(folder / "u.data", (f"{r['user']}\t{r['movie']}\t{r['rating']}\t{r['timestamp']}" for r in ratings))
    fields = ("user", "age", "gender", "occupation", "zip")
    text(folder / "u.user", ("|".join(str(u[f]) for f in fields) for u in users.values()))
    lines = (
        f'{m}|Amélie "{m}" (1995)|01-Jan-1995||http://us.imdb.com/{m}|'
        + "|".join(str(int(g in found)) for g in range(19))
        for m, found in genres.items()
    )
    text(folder / "u.item", lines, "latin-1")
    return ratings, users, genres


def movielens_1m(folder: Path, rows: int, seed: int = 0) -> tuple[list[Row], dict[int, Row], dict[int, list[str]]]:
    """ratings.dat, users.dat, movies.dat."""
    ratings, users = _ratings(rows, seed), _users(seed)
    names = ["Comedy", "Drama", "Film-Noir", "Sci-Fi"]
    genres = {m: sorted({names[m % 4], names[m * 3 % 4]}) for m in range(1, 41)}
    text(folder / "ratings.dat", (f"{r['user']}::{r['movie']}::{r['rating']}::{r['timestamp']}" for r in ratings))
    fields = ("user", "gender", "age", "occupation", "zip")
    text(folder / "users.dat", ("::".join(str(u[f]) for f in fields) for u in users.values()))
    lines = (f"{m}::Star Trek: Amélie, {m} (1995)::{'|'.join(found)}" for m, found in genres.items())
    text(folder / "movies.dat", lines, "latin-1")
    return ratings, users, genres


def movielens_25m(folder: Path, rows: int, seed: int = 0) -> tuple[list[Row], dict[int, list[str]]]:
    """ratings.csv, movies.csv, with half stars."""
    ratings = [r | {"rating": r["rating"] - 0.5} for r in _ratings(rows, seed)]
    genres = {m: ["(no genres listed)"] if m == 7 else ["Comedy", "Drama"][: 1 + m % 2] for m in range(1, 41)}
    old = {"user": "userId", "movie": "movieId", "rating": "rating", "timestamp": "timestamp"}
    table(folder / "ratings.csv", [{old[name]: value for name, value in r.items()} for r in ratings])
    movies = [{"movieId": m, "title": f'The "{m}", or so', "genres": "|".join(found)} for m, found in genres.items()]
    table(folder / "movies.csv", movies)
    return ratings, genres


def _ratings(rows: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [
        {"user": int(rng.integers(1, 31)), "movie": int(rng.integers(1, 41)), "rating": int(rng.integers(1, 6)),
         "timestamp": 881250949 + int(rng.integers(0, 60 * 86_400))}
        for _ in range(rows)
    ]  # fmt: skip


def _users(seed: int) -> dict[int, Row]:
    rng = np.random.default_rng(seed + 1)
    jobs = ["writer", "other", "technician"]
    return {
        u: {
            "user": u,
            "age": int(rng.integers(18, 60)),
            "gender": "MF"[u % 2],
            "occupation": jobs[u % 3],
            "zip": f"0{u % 5}",
        }
        for u in range(1, 31)
    }


TABS = {0: 0.2, 1: 0.6, 2: 0.08, 4: 0.05, 6: 0.04, 9: 0.02, 14: 0.01}


def kuairand(folder: Path, rows: int, seed: int = 0) -> tuple[list[Row], dict[int, Row], dict[int, Row]]:
    """The five files under folder/data: (rows of all logs in their order, users, videos)."""
    rng = np.random.default_rng(seed)
    first = date(2022, 4, 8)
    tabs = rng.choice(list(TABS), rows, p=list(TABS.values()))
    log: list[Row] = []
    for i in range(rows):
        day = first + timedelta(days=i * 31 // rows)
        log.append(
            {"user_id": int(rng.integers(0, 20)), "video_id": int(rng.integers(0, 60)), "date": day.strftime("%Y%m%d"),
             "hourmin": int(rng.integers(0, 24)) * 100 + 30, "time_ms": 1649347200000 + i,
             "is_click": int(rng.random() < 0.4), "is_like": int(rng.random() < 0.1), "is_hate": 0,
             "long_view": int(rng.random() < 0.3), "play_time_ms": 500, "duration_ms": int(rng.integers(5000, 10**8)),
             "is_rand": 0, "tab": int(tabs[i])}
        )  # fmt: skip
    cut = next(i for i, row in enumerate(log) if row["date"] >= "20220422")
    random = [row | {"is_rand": 1} for row in log[cut + 10 : cut + 40]]
    for name, part in (
        ("standard_4_08_to_4_21", log[:cut]), ("standard_4_22_to_5_08", log[cut:]), ("random_4_22_to_5_08", random)
    ):  # fmt: skip
        table(folder / "data" / f"log_{name}_1k.csv", part)
    users, videos = _kuairand_users(rng), _kuairand_videos(rng)
    table(folder / "data" / "user_features_1k.csv", list(users.values()))
    table(folder / "data" / "video_features_basic_1k.csv", list(videos.values()))
    return log + random, users, videos


def _kuairand_users(rng: np.random.Generator) -> dict[int, Row]:
    users = {}
    for u in range(20):
        row: Row = {"user_id": u, "user_active_degree": ["full_active", "high_active", "UNKNOWN"][u % 3]}
        row |= dict.fromkeys(("is_lowactive_period", "is_live_streamer", "is_video_author"), u % 2)
        for name, ranges in (
            ("follow_user_num", ["0", "(0,10]"]), ("fans_user_num", ["0", "[1,10)"]),
            ("friend_user_num", ["0", "[1,5)"]), ("register_days", ["15-30", "730+"]),
        ):  # fmt: skip
            row |= {name: int(rng.integers(0, 1000)), f"{name}_range": ranges[u % 2]}
        row |= {f"onehot_feat{i}": None if (u + i) % 9 == 0 else float((u * i) % 7) for i in range(18)}
        users[u] = row
    return users


def _kuairand_videos(rng: np.random.Generator) -> dict[int, Row]:
    return {
        v: {"video_id": v, "author_id": v // 2, "video_type": ["NORMAL", "AD"][v % 7 == 0], "upload_dt": "2022-04-01",
            "upload_type": ["ShortImport", "LongImport"][v % 2], "visible_status": None if v == 3 else 1.0,
            "video_duration": None if v == 4 else 17200.0, "server_width": 720, "server_height": 1280,
            "music_id": int(rng.integers(0, 10**9)), "music_type": None if v == 5 else 4.0,
            "tag": None if v == 6 else ",".join(str(t) for t in sorted({v % 5, v % 3}))}
        for v in range(60)
    }  # fmt: skip


DOMAINS = (9356372, 9351665, 9351667)  # what field 301 is made to say
SINGLE = {"101": 40, "121": 9, "122": 5, "124": 3, "125": 6, "126": 3, "127": 3, "128": 3, "129": 4}


def aliccp(folder: Path, rows: int, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """The four files: (samples of train, of test), each with its common features joined."""
    return _aliccp_half(folder, "train", rows, seed), _aliccp_half(folder, "test", rows // 2, seed + 1)


def _aliccp_half(folder: Path, half: str, rows: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    common, lines = {}, []
    for k in range(25):
        own: Row = {f: 30000 + int(rng.integers(0, n)) if rng.random() > 0.05 else None for f, n in SINGLE.items()}
        many = [("109_14", int(v)) for v in rng.integers(0, 50, 4)]
        common[f"{half}{k:028x}"] = own
        pairs = [(f, v) for f, v in own.items() if v is not None] + many
        lines.append(f"{half}{k:028x},{len(pairs)},{features(pairs)}")
    text(folder / f"common_features_{half}.csv", lines)
    samples, lines = [], []
    for i in range(rows):
        key = f"{half}{int(rng.integers(0, 25)):028x}"
        click = int(rng.random() < 0.3)
        conversion = int(rng.random() < (0.2 if click else 0.03))
        own = {f: 5000 + int(rng.integers(0, 30)) if rng.random() > 0.1 else None for f in
               ("205", "206", "207", "216", "508", "509", "702", "853")}  # fmt: skip
        own["301"] = None if rng.random() < 0.02 else DOMAINS[int(rng.choice(3, p=[0.38, 0.02, 0.6]))]
        pairs = [(f, v) for f, v in own.items() if v is not None] + [("210", 77), ("210", 78)]
        lines.append(f"{i + 1},{click},{conversion},{key},{len(pairs)},{features(pairs)}")
        samples.append({"sample_id": i + 1, "click": click, "conversion": conversion, **common[key], **own})
    text(folder / f"sample_skeleton_{half}.csv", lines)
    return samples


def features(pairs: Sequence[tuple[str, int]]) -> str:
    """A list of features as the files have it."""
    return "\x01".join(f"{field}\x02{value}\x031.0" for field, value in pairs)
