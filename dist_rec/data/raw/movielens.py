"""MovieLens 100K, 1M, 10M, 20M, 25M and 32M (GroupLens): ratings of movies; the label is a rating of 4 or more.

Files expected in RAW, plain or gzip:

- 100K: u.data (user, movie, rating, timestamp; tabs), u.user (id|age|gender|occupation|zip), u.item (24 fields:
  id|title| release|video release|url|19 flags of genres).
- 1M: ratings.dat (user::movie::rating::timestamp), users.dat (id::gender::age::occupation::zip), movies.dat
  (id::title:: genres, with | between them). 10M has the same files, but no users.dat.
- 20M, 25M, 32M: ratings.csv (userId, movieId, rating, timestamp), movies.csv (movieId, title, genres with | between
  them).

Columns: `label`, user_id, movie_id, genres (a list), and for 100K and 1M gender, age, occupation and zip. The rating
itself is not written, as it is the label.

Split, by time: the first days with 80 % of the ratings are training, those up to 90 % validation, the rest test.

Memory: the movies and users.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_rec.data.raw_log import Block, Days, Lookup, RawLog, codes
from dist_rec.data.text_files import Rows, TextFile, find, find_optional

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
PROFILE = ("gender", "age", "occupation", "zip")
SECONDS_PER_DAY = 86_400
PUBLISHED_ROWS = {"MovieLens-100K": 100_000, "MovieLens-1M": 1_000_209, "MovieLens-10M": 10_000_054}
_USER_100K = ("user", "age", "gender", "occupation", "zip")
_USER_1M = ("user", "gender", "age", "occupation", "zip")
_MOVIE_100K = ("movie", "title", "release", "video_release", "url", *GENRES_100K)


class _Release(NamedTuple):
    """`names`: the columns of user, movie, rating and timestamp in `ratings`. `users`: None if it tells none."""

    name: str
    ratings: TextFile
    names: tuple[str, str, str, str]
    movies: Lookup
    users: Lookup | None = None


def open_log(raw: Path) -> RawLog:
    """The ratings in folder `raw`; reads them once, for the rows of each day."""
    release = _release(raw)
    per_day: Counter[int] = Counter()
    for rows in release.ratings.batches():
        days, counts = np.unique(_day(release, rows), return_counts=True)
        per_day.update(dict(zip(days.tolist(), counts.tolist(), strict=True)))
    split = Days.of(per_day, release.ratings.path)
    train, validation = (str(np.datetime64(day, "D")) for day in split)
    return RawLog(
        about=f"{release.name}; training up to {train}, validation up to {validation}, test after it.",
        blocks=lambda: _blocks(release, split),
        labels=("label",),
        sparse=("user_id", "movie_id", "genres", *(PROFILE if release.users is not None else ())),
        groups={"user": "user"},
        rows=PUBLISHED_ROWS.get(release.name),
    )


def _blocks(release: _Release, days: Days) -> Iterator[Block]:
    user_name, movie_name, rating_name, _ = release.names
    for rows in release.ratings.batches():
        user, movie, rating = (rows.numbers(name) for name in (user_name, movie_name, rating_name))
        rows.refuse((rating < 0.5) | (rating > 5), rating_name, "a rating from 0.5 to 5")
        columns = {"label": pa.array((rating >= 4).astype(np.float32)), "user": pa.array(user)}
        columns |= {"user_id": pa.array(user), "movie_id": pa.array(movie)}
        columns |= release.movies.take(movie, ("genres",))
        if release.users is not None:
            columns |= release.users.take(user, PROFILE)
        yield Block(days.split(_day(release, rows)), columns)


def _day(release: _Release, rows: Rows) -> np.ndarray:
    """(n,) days since 1970."""
    return rows.numbers(release.names[3]) // SECONDS_PER_DAY


def _release(raw: Path) -> _Release:
    """The release whose files lie in `raw`."""
    names = ("user", "movie", "rating", "timestamp")
    kinds = dict(zip(names, (pa.int64(), pa.int64(), pa.float64(), pa.int64()), strict=True))
    if path := find_optional(raw, "u.data"):
        ratings = TextFile(path, kinds, names=names, delimiter="\t")
        users = _users(TextFile(find(raw, "u.user"), _kinds(_USER_100K), names=_USER_100K, delimiter="|"))
        return _Release("MovieLens-100K", ratings, names, _movies_100k(find(raw, "u.item")), users)
    if path := find_optional(raw, "ratings.dat"):
        ratings = TextFile(path, kinds, names=_with_gaps(names), delimiter=":")
        movies = _movies_dat(find(raw, "movies.dat"))
        users_path = find_optional(raw, "users.dat")
        if users_path is None:
            return _Release("MovieLens-10M", ratings, names, movies)
        users = _users(TextFile(users_path, _kinds(_USER_1M), names=_with_gaps(_USER_1M), delimiter=":"))
        return _Release("MovieLens-1M", ratings, names, movies, users)
    path = find(raw, "u.data", "ratings.dat", "ratings.csv")
    names = ("userId", "movieId", "rating", "timestamp")
    ratings = TextFile(path, dict(zip(names, kinds.values(), strict=True)))
    return _Release("MovieLens", ratings, names, _movies_csv(find(raw, "movies.csv")))


def _with_gaps(names: tuple[str, ...]) -> list[str]:
    """The columns that a file with :: between its fields has if it is read with : between them."""
    gaps = [part for name in names for part in (name, f"gap behind {name}")]
    return gaps[:-1]


def _kinds(names: tuple[str, ...]) -> dict[str, pa.DataType]:
    return {name: pa.int64() if name in ("user", "age") else pa.string() for name in names}


def _users(file: TextFile) -> Lookup:
    users = Lookup.read(file.batches(), "user")
    for name in ("gender", "occupation", "zip"):
        users.replace(name, codes(users.column(name)))
    return users


def _movies_100k(path: Path) -> Lookup:
    """u.item: a flag for each genre."""
    kinds = {"movie": pa.int64(), **dict.fromkeys(GENRES_100K, pa.int8())}
    file = TextFile(path, kinds, names=_MOVIE_100K, delimiter="|", encoding="latin-1")
    movies = Lookup.read(file.batches(), "movie")
    flags = np.stack([movies.column(genre).to_numpy() for genre in GENRES_100K], axis=1) != 0
    offsets = np.concatenate([[0], flags.sum(axis=1).cumsum()]).astype(np.int32)
    movies.replace("genres", pa.ListArray.from_arrays(offsets, pa.array(np.nonzero(flags)[1])))
    return movies


def _movies_dat(path: Path) -> Lookup:
    """movies.dat: titles have single colons in them, so that its lines are cut at :: here."""
    file = TextFile(path, {"line": pa.string()}, names=["line"], delimiter="\x01", encoding="latin-1")
    keys, genres = [], []
    for rows in file.batches():
        fields = pc.split_pattern(rows.column("line"), "::")
        rows.refuse(pc.not_equal(pc.list_value_length(fields), 3), "line", "movie::title::genres")
        movie = pc.list_element(fields, 0)
        rows.refuse(pc.invert(pc.match_substring_regex(movie, "^[0-9]{1,18}$")), "line", "a movie's number first")
        keys.append(movie.cast(pa.int64()))
        genres.append(pc.list_element(fields, 2))
    return Lookup(pa.chunked_array(keys).to_numpy(), {"genres": _genres(pa.chunked_array(genres))})


def _movies_csv(path: Path) -> Lookup:
    file = TextFile(path, {"movieId": pa.int64(), "genres": pa.string()}, quotes=True, empty={"genres"})
    movies = Lookup.read(file.batches(), "movieId")
    movies.replace("genres", _genres(pa.chunked_array([movies.column("genres")])))
    return movies


def _genres(text: pa.ChunkedArray) -> pa.ListArray:
    """(n,) "Comedy|Drama" -> (n,) lists of numbers of genres."""
    lists = pc.split_pattern(pc.fill_null(text.combine_chunks(), ""), "|")
    offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy())]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, codes(lists.flatten()))
