"""Ali-CCP (Ma et al. 2018, arXiv 1804.07931): impressions at Taobao with their clicks and purchases.

Files expected in RAW, plain or gzip, without header:

- sample_skeleton_train.csv, sample_skeleton_test.csv: sample id, click, conversion, key of common features, number of
  features, features. A feature is field, \\x02, id, \\x03, value; \\x01 stands between features.
- common_features_train.csv, common_features_test.csv: key, number of features, features; those of the user, which
  many samples share.

Columns: `click`, `conversion`, and f<field> for the 18 fields with one value for a sample: of the user 101 (user id),
121, 122, 124 .. 129; of the item 205 (id), 206, 207, 216; of both 508, 509, 702, 853; and `domain`, field 301, its
values in order. Values of features (logarithms of counts) are not read, nor are the fields with many values (109_14,
110_14, 127_14, 150_14, 210): the AITM and Scenario-Wise-Rec preprocessing is the source of this choice. Label:
`click`, on which the multi-domain models are compared. `conversion` is written too; a config declares it with
schema.labels.conversion={}. It is one of all impressions then, a click with a purchase after it (CTCVR).

Split: the train file is training; the test file, which is later, is halved at random, by a hash of the sample id,
into validation and test, as Scenario-Wise-Rec does. Samples with a conversion and no click contradict themselves and
are left out, and so are those without field 301. That benchmark counts 32,236,951, 639,897 and 52,439,671 rows in the
three domains. The train file is grouped by user: shuffle.

Memory: the common features of both files, some 200 bytes for each of 1.6 million keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dist_rec.data.footers import DataError
from dist_rec.data.ids import hash_ids
from dist_rec.data.raw_log import LEFT_OUT, Block, RawLog
from dist_rec.data.text_files import Rows, TextFile, find

USER_FIELDS = ("101", "121", "122", "124", "125", "126", "127", "128", "129")
SAMPLE_FIELDS = ("205", "206", "207", "216", "508", "509", "702", "853")
DOMAIN_FIELD = "301"
_SAMPLE = ("sample_id", "click", "conversion", "key", "num_features", "features")
_COMMON = ("key", "num_features", "features")


class _Common(NamedTuple):
    """The user's fields of every key."""

    path: Path
    keys: pa.Array
    fields: dict[str, pa.Array]


class _Half(NamedTuple):
    samples: Path
    common: _Common
    is_train: bool


def open_log(raw: Path) -> RawLog:
    """The log in folder `raw`; holds the common features and reads the training samples once, for the domains."""
    halves = []
    for name in ("train", "test"):
        samples, common = find(raw, f"sample_skeleton_{name}.csv"), find(raw, f"common_features_{name}.csv")
        halves.append(_Half(samples, _common(common), name == "train"))
    domains = _domains(halves[0].samples)
    fields = tuple(f"f{field}" for field in (*USER_FIELDS, *SAMPLE_FIELDS))
    return RawLog(
        about=f"Ali-CCP; values {', '.join(map(str, domains))} of field 301 are domains 0 to {len(domains) - 1}; the "
        "test file is halved at random into validation and test; conversions without a click are left out.",
        blocks=lambda: (block for half in halves for block in _blocks(half, domains)),
        labels=("click",),
        sparse=fields,
        others=("conversion",),
        numbered={"domain": len(domains)},
        groups={"domain": "domain", "user": "user"},
    )


def _domains(path: Path) -> list[int]:
    """The values of field 301, ascending."""
    found: set[int] = set()
    for rows in _samples(path):
        field = pc.extract_regex(rows.column("features"), f"(?:^|\x01){DOMAIN_FIELD}\x02(?P<id>[0-9]{{1,18}})\x03")
        found.update(pc.struct_field(field, "id").unique().drop_null().to_pylist())
    if len(found) < 2:
        raise DataError(f"{path}: field {DOMAIN_FIELD} has {len(found)} value(s); domains need several; is it whole?")
    return sorted(map(int, found))


def _blocks(half: _Half, domains: list[int]) -> Iterator[Block]:
    known, common = pa.array(domains), half.common
    for rows in _samples(half.samples):
        columns = {name: rows.binary(name) for name in ("click", "conversion")}
        place = pc.index_in(rows.column("key"), value_set=common.keys)
        rows.refuse(place.is_null(), "key", f"a key of {common.path.name}")
        columns |= {f"f{name}": column.take(place) for name, column in common.fields.items()}
        own = _fields(rows, (*SAMPLE_FIELDS, DOMAIN_FIELD))
        columns |= {f"f{name}": own[name] for name in SAMPLE_FIELDS}
        domain = pc.index_in(own[DOMAIN_FIELD], value_set=known)
        columns["domain"] = pc.fill_null(domain, 0)
        columns["user"] = pc.fill_null(columns["f101"], -1)
        contradicts = pc.and_(pc.equal(columns["conversion"], 1), pc.equal(columns["click"], 0))
        left_out = pc.or_(contradicts, domain.is_null()).to_numpy(zero_copy_only=False)
        split = np.zeros(len(left_out), np.int8) if half.is_train else 1 + hash_ids(rows.numbers("sample_id"), 2)
        yield Block(np.where(left_out, LEFT_OUT, split).astype(np.int8), columns)


def _samples(path: Path) -> Iterator[Rows]:
    kinds = dict(zip(_SAMPLE, _kinds("int64", "int8", "int8", "string", "int64", "string"), strict=True))
    return TextFile(path, kinds, names=_SAMPLE).batches()


def _kinds(*names: str) -> list[pa.DataType]:
    return [pa.type_for_alias(name) for name in names]


def _common(path: Path) -> _Common:
    kinds = dict(zip(_COMMON, _kinds("string", "int64", "string"), strict=True))
    keys: list[pa.Array] = []
    fields: dict[str, list[pa.Array]] = {name: [] for name in USER_FIELDS}
    for rows in TextFile(path, kinds, names=_COMMON).batches():
        keys.append(rows.column("key"))
        for name, column in _fields(rows, USER_FIELDS).items():
            fields[name].append(column)
    every = pa.chunked_array(keys).combine_chunks()
    first = np.unique(every.dictionary_encode().indices.to_numpy(), return_index=True)[1]
    if len(first) < len(every):
        line = int(np.setdiff1d(np.arange(len(every)), first)[0])
        raise DataError(f"{path}: line {line + 1}: key '{every[line]}' is there for a second time")
    return _Common(path, every, {n: pa.chunked_array(c).combine_chunks() for n, c in fields.items()})


def _fields(rows: Rows, wanted: tuple[str, ...]) -> dict[str, pa.Array]:
    """field -> (n,) int64 ids, null where a row has none, the first where it has several."""
    lists = pc.split_pattern(rows.column("features"), "\x01")
    told, found = rows.column("num_features"), pc.list_value_length(lists)
    for row in np.flatnonzero(pc.not_equal(told, found).to_numpy(zero_copy_only=False))[:1]:
        rows.fail(int(row), f"says {told[row]} features, but has {found[row]}; is the line whole?")
    parts = pc.extract_regex(lists.flatten(), "^(?P<field>[^\x02]+)\x02(?P<id>[0-9]{1,18})\x03(?P<value>[^\x03]+)$")
    owner = pc.list_parent_indices(lists).to_numpy()
    if parts.null_count:
        bad = int(np.flatnonzero(parts.is_null().to_numpy(zero_copy_only=False))[0])
        rows.fail(int(owner[bad]), f"feature {lists.flatten()[bad]} is not field, \\x02, id, \\x03, value")
    names, result = pc.struct_field(parts, "field"), {}
    for field in wanted:
        here = pc.equal(names, field)
        ids = pc.struct_field(parts, "id").filter(here).cast(pa.int64()).to_numpy()
        values, missing = np.zeros(len(lists), np.int64), np.ones(len(lists), np.bool_)
        row = owner[here.to_numpy(zero_copy_only=False)][::-1]  # the first of several is written last
        values[row], missing[row] = ids[::-1], False
        result[field] = pa.array(values, mask=missing)
    return result
