"""Every data set, from raw files to Parquet: each row against what was written, its split, its ids, its schema."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from dist_rec.data import text_files
from dist_rec.data.footers import DataError
from dist_rec.data.ids import hash_ids
from dist_rec.data.prepared import prepare
from dist_rec.prepare import load, names
from tests.data.raw import files
from tests.data.raw.files import Row


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of text in each file, so that what holds between blocks is seen."""
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 8192)


def prepared(name: str, raw: Path, out: Path, **options: Any) -> dict[str, list[Row]]:
    """split -> its rows, as they were written."""
    prepare(load(name).open_log(raw), out, **options)
    return {folder.name: pq.read_table(folder).to_pylist() for folder in out.iterdir() if folder.is_dir()}


def check(
    found: Mapping[str, list[Row]],
    expected: Mapping[str, list[Row]],
    out: Path,
    *,
    labels: Sequence[str] = ("label",),
    sparse: Sequence[str],
    dense: Sequence[str] = (),
    same: Sequence[str] = (),
) -> None:
    """Rows in order; ids are ranks among the values of training, 0 for others; scales are those of training."""
    assert {split: len(rows) for split, rows in found.items()} == {split: len(rows) for split, rows in expected.items()}
    schema = yaml.safe_load((out / "schema.yaml").read_text())["schema"]
    counts = json.loads((out / "counts.json").read_text())
    for name in sparse:
        seen = {v for row in expected["train"] for v in _list(row[name]) if v is not None}
        ids = {value: i + 1 for i, value in enumerate(sorted(seen))}
        assert schema["sparse"][name]["num_ids"] == len(ids) + 1, name
        for split, rows in expected.items():
            wanted = [[ids.get(v, 0) for v in _list(row[name])] for row in rows]
            assert [_list(row[name]) for row in found[split]] == wanted, (name, split)
            zeros = sum(ids == [0] for ids in wanted) / len(wanted)
            if not schema["sparse"][name].get("multi"):
                told = counts["splits"][split]["missing_or_unseen"].get(name, 0)
                assert told == pytest.approx(zeros), (name, split)
    for name in dense:
        x = np.array([row[name] or 0 for row in expected["train"]], dtype=np.float64)
        t = np.sign(x) * np.log1p(np.abs(x))
        assert schema["dense"][name]["mean"] == pytest.approx(t.mean(), abs=1e-4)
        assert schema["dense"][name]["std"] == pytest.approx(t.std(), abs=1e-4)
        nulls = any(row[name] is None for rows in expected.values() for row in rows)
        assert ("on_null" in schema["dense"][name]) == nulls
    for split, rows in expected.items():
        for name in (*labels, *dense, *same):
            assert [row[name] for row in found[split]] == [_single(row[name]) for row in rows], (name, split)
        for name in labels:
            mean = sum(row[name] for row in rows) / len(rows)
            assert counts["splits"][split]["positives"].get(name, mean) == pytest.approx(mean)


def _single(value: Any) -> Any:
    return None if value is None else float(np.float32(value))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def by_day(rows: Sequence[Row], day: str) -> dict[str, list[Row]]:
    """The documented split: the first days with 80 % of the rows, those up to 90 %, the rest."""
    counts, before, split_of = Counter(row[day] for row in rows), 0, {}
    for d in sorted(counts):
        split_of[d] = "train" if before < 0.8 * len(rows) else "validation" if before < 0.9 * len(rows) else "test"
        before += counts[d]
    return {s: [row for row in rows if split_of[row[day]] == s] for s in ("train", "validation", "test")}


def test_every_data_set_has_a_test_here() -> None:
    tested = {name.removeprefix("test_").split("_")[0] for name in globals() if name.startswith("test_")}
    assert set(names()) <= tested


def _hex(rows: Sequence[Row], columns: Sequence[str]) -> list[Row]:
    return [row | {c: None if row[c] is None else int(row[c], 16) for c in columns} for row in rows]


@pytest.mark.parametrize("name", ["train.txt", "train.txt.gz"])
def test_criteo_kaggle(tmp_path: Path, name: str) -> None:
    sparse, dense = [f"c{i}" for i in range(1, 27)], [f"i{i}" for i in range(1, 14)]
    rows = _hex(files.criteo(tmp_path / "raw" / name, 700), sparse)
    found = prepared("criteo", tmp_path / "raw", tmp_path / "out")
    expected = {"train": rows[:600], "validation": rows[600:650], "test": rows[650:]}
    check(found, expected, tmp_path / "out", sparse=sparse, dense=dense)


def test_criteo_terabyte(tmp_path: Path) -> None:
    sparse, dense = [f"c{i}" for i in range(1, 27)], [f"i{i}" for i in range(1, 14)]
    # day_10 comes after day_2: numbers, not text
    folder = {2: "raw", 10: "raw", 1: "raw/data"}
    days = {n: _hex(files.criteo(tmp_path / place / f"day_{n}.gz", 90, seed=n), sparse) for n, place in folder.items()}
    found = prepared("criteo", tmp_path / "raw", tmp_path / "out")
    expected = {"train": days[1] + days[2], "validation": days[10][:45], "test": days[10][45:]}
    check(found, expected, tmp_path / "out", sparse=sparse, dense=dense)


def test_avazu(tmp_path: Path) -> None:
    hexadecimal = ["site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category"]
    hexadecimal += ["device_id", "device_ip", "device_model"]
    integers = ["C1", "banner_pos", "device_type", "device_conn_type", *(f"C{i}" for i in range(14, 22))]
    rows = _hex(files.avazu(tmp_path / "raw" / "train.gz", 500), hexadecimal)
    rows = [
        r | {"day": r["hour"][:6], "hour": int(r["hour"][6:]), "weekday": (int(r["hour"][4:6]) - 20) % 7} for r in rows
    ]
    found = prepared("avazu", tmp_path / "raw", tmp_path / "out")  # 2014-10-20 was a Monday
    expected = {"train": rows[:400], "validation": rows[400:450], "test": rows[450:]}
    assert expected == by_day(rows, "day")
    same = ("hour", "weekday")
    check(found, expected, tmp_path / "out", labels=("click",), sparse=[*hexadecimal, *integers], same=same)
    schema = yaml.safe_load((tmp_path / "out" / "schema.yaml").read_text())["schema"]
    assert [schema["sparse"][n]["num_ids"] for n in ("hour", "weekday")] == [24, 7]


def _rated(ratings: Sequence[Row], movies: Mapping[int, list[Any]], users: Mapping[int, Row]) -> dict[str, list[Row]]:
    rows = [
        {"label": int(r["rating"] >= 4), "user": r["user"], "user_id": r["user"], "movie_id": r["movie"],
         "genres": movies[r["movie"]], **users.get(r["user"], {}), "day": r["timestamp"] // 86_400}
        for r in ratings
    ]  # fmt: skip
    return by_day(rows, "day")


def _in_order(values: Sequence[Any]) -> dict[Any, int]:
    """Text -> its number in the order of first rows, whose order the ids have."""
    return {value: i for i, value in enumerate(dict.fromkeys(values))}


@pytest.mark.parametrize("release", ["100k", "1m"])
def test_movielens_with_users(tmp_path: Path, release: str) -> None:
    writer = {"100k": files.movielens_100k, "1m": files.movielens_1m}[release]
    ratings, users, genres = writer(tmp_path / "raw", 600)
    order = {name: _in_order([u[name] for u in users.values()]) for name in ("gender", "occupation", "zip")}
    users = {k: u | {name: codes[u[name]] for name, codes in order.items()} for k, u in users.items()}
    if release == "1m":
        names = _in_order([name for found in genres.values() for name in found])
        genres = {m: [names[g] for g in found] for m, found in genres.items()}
    found = prepared("movielens", tmp_path / "raw", tmp_path / "out")
    sparse = ("user_id", "movie_id", "genres", "gender", "age", "occupation", "zip")
    check(found, _rated(ratings, genres, users), tmp_path / "out", sparse=sparse, same=("user",))


def test_movielens_25m(tmp_path: Path) -> None:
    ratings, genres = files.movielens_25m(tmp_path / "raw", 600)
    names = _in_order([name for found in genres.values() for name in found])
    genres = {m: [names[g] for g in found] for m, found in genres.items()}
    found = prepared("movielens", tmp_path / "raw", tmp_path / "out")
    sparse = ("user_id", "movie_id", "genres")
    check(found, _rated(ratings, genres, {}), tmp_path / "out", sparse=sparse, same=("user",))
    lengths = [len(genres[r["movie_id"]]) for r in _rated(ratings, {m: [m] for m in genres}, {})["train"]]
    schema = yaml.safe_load((tmp_path / "out" / "schema.yaml").read_text())["schema"]
    assert schema["sparse"]["genres"]["mean_length"] == pytest.approx(np.mean(lengths), abs=0.006)


def test_kuairand(tmp_path: Path) -> None:
    log, users, videos = files.kuairand(tmp_path / "raw", 1500)
    text = ["user_active_degree", *(f"{n}_range" for n in NUMBERS)]
    order = {n: _in_order([u[n] for u in users.values()]) for n in text}
    users = {k: u | {n: codes[u[n]] for n, codes in order.items()} for k, u in users.items()}
    order = {n: _in_order([v[n] for v in videos.values()]) for n in ("video_type", "upload_type")}
    videos = {k: v | {n: codes[v[n]] for n, codes in order.items()} for k, v in videos.items()}
    kept = (0, 1, 2, 4, 6)
    rows = [
        {**users[r["user_id"]], **videos[r["video_id"]], **r, "hour": r["hourmin"] // 100, "user": r["user_id"],
         "domain": kept.index(r["tab"]), "tag": [int(t) for t in (videos[r["video_id"]]["tag"] or "").split(",") if t]}
        for r in log if r["tab"] in kept
    ]  # fmt: skip
    found = prepared("kuairand", tmp_path / "raw", tmp_path / "out")
    expected = by_day([r for r in rows if not r["is_rand"]], "date") | {"random": [r for r in rows if r["is_rand"]]}
    ids = ["is_lowactive_period", "is_live_streamer", "is_video_author", *(f"onehot_feat{i}" for i in range(18))]
    ids += ["author_id", "visible_status", "music_id", "music_type", "tag", "user_id", "video_id"]
    check(
        found, expected, tmp_path / "out", labels=("is_click", "is_like", "long_view"),
        sparse=[*text, *ids, "video_type", "upload_type"], dense=(*NUMBERS, "duration_ms"),
        same=("hour", "domain", "user"),
    )  # fmt: skip
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["rows_read"] == len(log) and counts["rows_left_out"] == len(log) - len(rows)
    by_domain = Counter(r["domain"] for r in expected["train"])
    assert counts["splits"]["train"]["rows_by_domain"] == {str(d): by_domain[d] for d in range(5)}
    assert len({r["date"] for r in expected["train"]}) == 25, "25 of the 31 days train"


NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")


def test_aliccp(tmp_path: Path) -> None:
    halves = files.aliccp(tmp_path / "raw", 600)
    domains = sorted(files.DOMAINS)
    kept = [
        [
            {**{f"f{k}" if k.isdigit() else k: v for k, v in r.items()}, "user": -1 if r["101"] is None else r["101"],
             "domain": domains.index(r["301"])}
            for r in half if r["301"] is not None and not (r["conversion"] and not r["click"])
        ]
        for half in halves
    ]  # fmt: skip
    found = prepared("aliccp", tmp_path / "raw", tmp_path / "out")
    assert len(found["validation"]) + len(found["test"]) == len(kept[1])
    assert 0.35 < len(found["test"]) / len(kept[1]) < 0.65
    # which half a sample is in only a hash knows: the rows of each are found in order among those of the file
    places = {split: _subsequence(kept[1], found[split]) for split in ("validation", "test")}
    assert sorted([*places["validation"], *places["test"]]) == list(range(len(kept[1])))
    expected = {"train": kept[0]} | {split: [kept[1][i] for i in index] for split, index in places.items()}
    fields = [f"f{f}" for f in (*files.SINGLE, "205", "206", "207", "216", "508", "509", "702", "853")]
    same, labels = ("user", "domain"), ("click", "conversion")
    check(found, expected, tmp_path / "out", labels=labels, sparse=fields, same=same)
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["rows_left_out"] == sum(map(len, halves)) - sum(map(len, kept)) > 0


def _subsequence(rows: Sequence[Row], found: Sequence[Row]) -> list[int]:
    """Where the rows of `found` are among `rows`, by the columns that are written as they are."""
    side = hash_ids(np.array([row["sample_id"] for row in rows]), 2)
    same = ("click", "conversion", "user", "domain")
    for half in (0, 1):
        index = [i for i in range(len(rows)) if side[i] == half]
        if [[row[n] for n in same] for row in found] == [[rows[i][n] for n in same] for i in index]:
            return index
    raise AssertionError("the rows are not one half of the file")


def test_more_values_than_ids_are_hashed(tmp_path: Path) -> None:
    files.criteo(tmp_path / "raw" / "train.txt", 700)
    found = prepared("criteo", tmp_path / "raw", tmp_path / "out", max_ids=12)
    schema = yaml.safe_load((tmp_path / "out" / "schema.yaml").read_text())["schema"]
    counts = json.loads((tmp_path / "out" / "counts.json").read_text())
    assert counts["hashed"] == [f"c{i}" for i in range(1, 27)]  # each has 30 values
    assert all(column["num_ids"] == 13 for column in schema["sparse"].values())
    ids = Counter(row["c1"] for rows in found.values() for row in rows)
    assert set(ids) <= set(range(13)) and len(ids) > 6, "0 is for missing values alone, the others share 12 ids"
    assert "Hashed" in (tmp_path / "out" / "schema.yaml").read_text()
    missing = counts["splits"]["train"]["missing_or_unseen"]["c1"]
    assert math.isclose(missing, 0.1, abs_tol=0.04)


REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "ctr_smoke_kaggle"


@pytest.mark.skipif(not REAL.is_dir(), reason=f"needs the real rows in {REAL}")
def test_real_values_of_criteo_and_avazu(tmp_path: Path) -> None:
    """The first rows of the real files, put back into their text format."""
    sparse, dense = [f"c{i}" for i in range(1, 27)], [f"i{i}" for i in range(1, 14)]
    real = pq.read_table(REAL / "criteo_kaggle_smoke.parquet").to_pylist()
    rows = [{n: None if r[n] is None else int(r[n]) for n in ["label", *dense, *sparse]} for r in real]
    cells = ([f"{v:08x}" if n in sparse else "" if v is None else str(v) for n, v in r.items()] for r in rows)
    files.text(tmp_path / "criteo" / "train.txt", ("\t".join(line) for line in cells))
    found = prepared("criteo", tmp_path / "criteo", tmp_path / "out")
    cuts = (len(rows) * 6 // 7, len(rows) * 6 // 7 + (len(rows) - len(rows) * 6 // 7) // 2)
    expected = {"train": rows[: cuts[0]], "validation": rows[cuts[0] : cuts[1]], "test": rows[cuts[1] :]}
    check(found, expected, tmp_path / "out", sparse=sparse, dense=dense)
    avazu = pq.read_table(REAL / "avazu_smoke.parquet").slice(0, 100).to_pylist()
    capitals = {"c1": "C1"} | {f"c{i}": f"C{i}" for i in range(14, 22)}
    lines = [{capitals.get(n, n): v for n, v in r.items() if n not in ("label", "timestamp", "split")} for r in avazu]
    lines = [{"id": 1, "click": int(r["label"]), "hour": 14102100} | line for r, line in zip(avazu, lines, strict=True)]
    files.table(tmp_path / "avazu" / "train.gz", lines)
    with pytest.raises(DataError, match=r"has rows of 1 day\(s\)"):
        load("avazu").open_log(tmp_path / "avazu")
