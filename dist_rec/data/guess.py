"""From a `Profile` to a first `Schema`: what each column probably is, with the reason in words beside every choice."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from dist_rec.data.footers import DataError
from dist_rec.data.profile import Column, Profile
from dist_rec.data.schema import DenseColumn, GroupColumn, LabelColumn, Schema, SparseColumn, WeightColumn


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


LABELS = _words(
    "label click clicked is_click is_clicked target y converted conversion is_converted is_conversion purchase "
    "purchased is_purchase buy is_buy like liked is_like response outcome"
)
"""Names of labels, the likeliest first."""

_WEIGHTS = _words("sample_weight weight example_weight instance_weight row_weight importance importance_weight")
_DOMAINS = _words(
    "domain domain_id scenario scenario_id scene scene_id city city_id country country_id market market_id region "
    "region_id channel channel_id tab site"
)
_USERS = _words("user_id userid user uid member_id customer_id visitor_id viewer_id account_id")
_COHORTS = _words("cohort cohort_id")
_OUTCOMES = _words("rating ratings stars review_score dwell_time watch_time play_time")
_TIMES = _words("time timestamp ts unix_time event_time datetime date created_at")
_SPLITS = _words("split fold is_train is_test")
_ROW_IDS = _words("row row_id index __index_level_0__ impression_id request_id event_id")
_AMOUNT = re.compile(
    r"^(n|num|count|total|sum|avg)_|_(count|cnt|price|amount|seconds|ms|duration|score)$|^(price|amount)$"
)

_LEAK = 0.45  # |AUC - 1/2| of a single column from which on it is taken for the label in disguise
_MAX_DOMAINS = 100
_MAX_REPORTED = 20  # domains that a report still shows one by one
_DIRECT_ROWS = 1_000_000  # a table of this many rows or fewer costs nothing: no hashing
_SPARSITY = 10  # ids this many times as large as they are many are hashes, not numbers


@dataclass
class Entry:
    """One feature column of the files.

    Attributes:
        column: how to declare it, None if a schema cannot hold it.
        note: what was found, a line without `#`.
        left_out: why it is no feature, empty if it is one.
    """

    name: str
    column: DenseColumn | SparseColumn | None
    note: str = ""
    left_out: str = ""


@dataclass
class Guess:
    """A schema and what is behind it.

    Attributes:
        entries: all columns but labels, per-id weights and the sample weight, in file order.
        notes: remarks by "label", "weight", "domain", "user", "cohort".
        warnings: what the user has to decide before a run can be right.
    """

    label: str
    schema: Schema
    entries: list[Entry]
    notes: dict[str, str]
    by: list[str] = field(default_factory=list)
    grouped_auc: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def guess(profile: Profile, label: str | None = None) -> Guess:
    """The schema that fits the files, with the label called `label`, or else found by its name or its 0s and 1s.

    Raises DataError if there is no such label, more than one could be it, or there is nothing to make a feature of.
    """
    label = _find_label(profile, label)
    weight = _find_weight(profile, label)
    pairs = _id_weights(profile)
    skip = {label, *pairs.values(), *([weight] if weight else [])}
    names = [name for name in profile.columns if name not in skip]
    entries = [_entry(profile, name, label, pairs.get(name)) for name in names]
    kept = [e for e in entries if not e.left_out]
    sparse = {e.name: e.column for e in kept if isinstance(e.column, SparseColumn)}
    if not sparse:
        left = "\n".join(f"  {e.name}: {e.left_out or e.note}" for e in entries)
        raise DataError(
            "no column can be an embedding's ids: a model needs at least one integer column, or list of integers, "
            f"that is no suspected leak. Encode one as int64, e.g. by a 64-bit hash. Columns besides the label:\n{left}"
        )
    schema = Schema(
        labels={label: LabelColumn()},
        dense={e.name: e.column for e in kept if isinstance(e.column, DenseColumn)},
        sparse=sparse,
    )
    result = Guess(label, schema, entries, {})
    _describe_label(profile.columns[label], profile, result)
    _add_weight(profile, weight, result)
    _add_groups(profile, result)
    return result


def _find_label(profile: Profile, asked: str | None) -> str:
    binary = [name for name, column in profile.columns.items() if column.is_binary and name not in profile.unusable]
    candidates = f"columns with only 0 and 1: {', '.join(binary) or 'none'}"
    if asked is not None:
        column = profile.columns.get(asked)
        if column is None:
            raise DataError(f"--label {asked}: there is no such column; {candidates}")
        if asked in profile.unusable:
            raise DataError(f"--label {asked}: the column {profile.unusable[asked]}; {candidates}")
        if not _can_be_label(column):
            found = f"{column.low} to {column.high}" if column.low is not None else column.type
            raise DataError(
                f"--label {asked}: the column holds {found}, and a binary label is 0 or 1 (number or bool); write such "
                f"a column, e.g. rating >= 4, or choose another; {candidates}"
            )
        return asked
    by_name = {_plain(name): name for name, c in profile.columns.items() if _can_be_label(c)}
    for name in LABELS:
        if name in by_name and by_name[name] not in profile.unusable:
            return by_name[name]
    if len(binary) == 1:
        return binary[0]
    raise DataError(
        f"no label found: no column of 0s and 1s is called {', '.join(LABELS[:6])} or the like, and "
        f"{'none' if not binary else 'more than one'} holds only 0 and 1; name it by --label NAME ({candidates}; all "
        f"columns: {', '.join(profile.columns)})"
    )


def _can_be_label(column: Column) -> bool:
    """Whether nothing but 0 and 1 was seen; a rare class can be missing in a sample."""
    flat = column.kind in ("integer", "float", "bool")
    return (
        flat
        and column.values > 0
        and column.low >= 0
        and column.high <= 1
        and (column.is_binary or column.distinct == 1)
    )


def _find_weight(profile: Profile, label: str) -> str | None:
    plain = {_plain(name): name for name in profile.columns}
    for name in (plain[n] for n in _WEIGHTS if n in plain):
        c = profile.columns[name]
        flat = c.kind in ("integer", "float") and name not in profile.unusable and name != label
        if flat and c.values and c.low >= 0 and not c.infinite:
            return name
    return None


def _id_weights(profile: Profile) -> dict[str, str]:
    """List of ids -> list of floats with the same lengths in every row."""
    pairs: dict[str, str] = {}
    usable = [c for c in profile.columns.values() if c.name not in profile.unusable and c.values]
    for weights in (c for c in usable if c.kind == "floats" and not c.null_items and not c.infinite):
        fitting = [
            ids.name
            for ids in usable
            if ids.kind == "integers" and ids.name not in pairs and profile.same_lengths(ids.name, weights.name)
        ]
        best = max(fitting, key=lambda name: _common_prefix(name, weights.name), default=None)
        if best is None:
            continue
        # lists that all have one length fit any other such list: an embedding vector is not the weights of a history
        all_equal = weights.mean_length == weights.max_length
        if not all_equal or "weight" in _plain(weights.name) or _common_prefix(best, weights.name) >= 3:
            pairs[best] = weights.name
    return pairs


def _entry(profile: Profile, name: str, label: str, weights: str | None) -> Entry:
    c = profile.columns[name]
    if (problem := _unreadable(c, profile.unusable.get(name))) is not None:
        return Entry(name, None, left_out=problem)
    sparse = c.kind == "integers" or (c.kind == "integer" and not _is_amount(c))
    entry = _sparse_entry(c, profile, weights) if sparse else _dense_entry(c, profile)
    entry.left_out = next(_reasons_against(c, entry.column, profile, label), "")
    if isinstance(entry.column, SparseColumn) and any(char in name for char in "@#."):
        return Entry(name, None, left_out="has one of @ # . in its name, which no sparse feature may have; rename it")
    return entry


def _unreadable(c: Column, problem: str | None) -> str | None:
    """Why a column cannot be declared at all."""
    if problem is not None:
        return problem
    if c.kind == "text":
        return (
            f"is text ({c.type}); encode it as int64 when the files are written, e.g. a 64-bit hash, and run init again"
        )
    if c.kind == "time":
        return f"is a time ({c.type}); write what matters of it as integers, e.g. the hour of the day"
    if c.kind == "floats":
        return (
            f"is {c.type} with the lengths of no list of ids; write one float column for each element that is a feature"
        )
    if c.kind == "other":
        return f"is {c.type}, which no schema can hold; write it as a number, an integer id or a list of integer ids"
    if not c.values:
        return f"held no value in {c.rows:,} rows"
    if c.infinite:
        return f"has {c.infinite:,} infinite values (in float32), which stop a run; correct them in the files"
    return None


def _is_amount(c: Column) -> bool:
    """Whether integers measure something: by the name, or by negative values that are no hashes."""
    plain = _plain(c.name)
    return bool(_AMOUNT.search(plain)) or plain in _TIMES or (c.low < -1 and not _is_hashed(c))


def _is_hashed(c: Column) -> bool:
    span = max(c.high + 1, 0) if c.low >= -1 else c.high - c.low + 1
    return span > max(_DIRECT_ROWS, _SPARSITY * c.estimate)


def _reasons_against(
    c: Column, column: DenseColumn | SparseColumn | None, profile: Profile, label: str
) -> Iterator[str]:
    """Why a column that could be a feature should be none."""
    plain, flat = _plain(c.name), c.kind not in ("integers", "floats")
    says_when = isinstance(column, SparseColumn) and (c.has_nulls or c.mean_length < c.max_length)
    if c.distinct == 1 and not says_when:
        yield f"constant: always {c.low}" + ("" if profile.is_whole else " in the sample")
    if flat:
        separation = profile.separation(c.name, label)
        if separation > _LEAK:
            yield f"suspected leak: alone it tells the label with an AUC of {0.5 + separation:.3f}"
    if plain in _OUTCOMES or (plain in LABELS and c.is_binary):
        also = "; if it is a second target, add it to labels" if c.is_binary else ""
        yield f"suspected leak by its name: it becomes known with the label or after it{also}"
    if plain in _TIMES:
        yield "a time by its name: split by it; as features derive e.g. the hour of the day"
    if plain in _SPLITS:
        yield "by its name it says which split a row belongs to: write each split to a folder of its own"
    unique = flat and c.kind == "integer" and c.distinct == c.values
    if unique and (plain in _ROW_IDS or (profile.is_whole and c.values >= 1000)):
        yield "every row has a value of its own: a number of the row, nothing to learn from"
    if c.kind == "float" and (plain == "id" or plain.endswith("_id")):
        yield "ids by its name, but written as floats, as pandas does where values are missing; cast to int64"


def _dense_entry(c: Column, profile: Profile) -> Entry:
    column = DenseColumn()
    note = f"{c.low + 0:.6g} to {c.high + 0:.6g}"
    if c.distinct > 1:
        moments = profile.moments(c.name)
        decimals = 3 - math.floor(math.log10(moments.std)) if moments.std > 0 else 0
        column.transform = moments.transform
        column.mean, column.std = round(moments.mean, decimals), round(moments.std, decimals) or 1.0
        if column.transform == "log1p":
            note += ", skewed"
    if c.has_nulls:
        column.on_null = "fill"
        column.fill = float(f"{profile.moments(c.name).neutral if c.distinct > 1 else c.low:.4g}")
        note += f"; {_nulls(c)}: filled by what becomes 0"
    return Entry(c.name, column, note)


def _sparse_entry(c: Column, profile: Profile, weights: str | None) -> Entry:
    column = SparseColumn(num_ids=1)
    note = [_size(c, column, profile)]
    if c.kind == "integers":
        column.multi, column.weights = True, weights
        column.mean_length = max(round(c.mean_length, 2), 0.01)
        note.append(f"at most {c.max_length} a row" + ("" if profile.is_whole else " in the sample"))
    if c.has_nulls or c.null_items:
        # one id a row stays one id a row, which is read faster than a list; an absent list looks nothing up
        column.on_null = "empty" if column.multi else "reserved"
        what = "look nothing up" if column.multi else "read a row of their own"
        note.append(f"{_nulls(c)}: these {what}")
    return Entry(c.name, column, "; ".join(note))


def _size(c: Column, column: SparseColumn, profile: Profile) -> str:
    """Sets num_ids and out_of_range; returns why.

    Largest id known of all rows: the default, "error", as an id above it is a mistake. Known of a sample only: larger
    ones are to be expected, so they are counted and share the reserved row, where they do no harm to the rows of other
    ids, which modulo or hash would let them train.
    """
    many = f"{c.distinct:,} ids" if profile.is_whole else f"about {c.estimate:,} ids ({c.distinct:,} in the sample)"
    if _is_hashed(c):
        column.num_ids, column.out_of_range = hash_rows(c.estimate), "hash"
        shared = 1 - math.exp(-c.estimate / column.num_ids)
        return f"{many} up to {max(c.high, -c.low):.1e}: hashed, {shared:.0%} of them share a row"
    column.num_ids = max(c.high + 1, 1)
    if not c.is_exact:
        column.num_ids, column.out_of_range = _round_up(column.num_ids + column.num_ids // 10), "reserved"
        return f"{many}, to {c.high:,} in the SAMPLE (+10 %; no statistics in the footers), larger ones share a row"
    if c.low < 0:
        column.out_of_range = "reserved"
        return f"{many}, {c.low:,} to {c.high:,}: negative ones (missing?) read a row of their own"
    return f"{many}, {c.low:,} to {c.high:,}" + ("" if profile.is_whole else " by the footers")


def hash_rows(distinct: int) -> int:
    """Rows for a table of hashed ids: four per id while that is cheap, two for more than a million ids."""
    return _round_up(max(1000, distinct * (4 if distinct <= _DIRECT_ROWS else 2)))


def _round_up(x: float) -> int:
    """To two digits: 12,345 becomes 13,000."""
    unit = 10 ** max(len(str(math.ceil(x))) - 2, 0)
    return math.ceil(x / unit) * unit


def _nulls(c: Column) -> str:
    """How many nulls there are and where that is known from."""
    missing = f"{c.nulls:,} of {c.rows:,} sampled rows are null" + (" or NaN" if c.kind == "float" else "")
    if c.total_nulls and c.total_nulls > c.nulls:
        missing = f"{c.total_nulls:,} nulls by the footers"
    return missing + (f", {c.null_items:,} null ids in lists" if c.null_items else "")


def _describe_label(c: Column, profile: Profile, result: Guess) -> None:
    y, missing = profile.values(c.name)
    rate = float(y[~missing].mean())
    result.notes["label"] = f"{rate:.4f} of the {'' if profile.is_whole else 'sampled '}rows are positive"
    if c.distinct == 1:
        result.warnings.append(
            f"label '{c.name}' was {c.low} in every row that was read: leaks could not be looked for"
        )
    if c.has_nulls:
        # no default: what an unknown label is nobody but the owner of the data can say
        text = f"{_nulls(c)}, at which a run stops; remove these rows, or set on_null: fill, fill: 0 if null means no"
        result.notes["label"] += f"; {text}"
        result.warnings.append(f"label '{c.name}': {text}")


def _add_weight(profile: Profile, name: str | None, result: Guess) -> None:
    if name is None:
        return
    c = profile.columns[name]
    result.schema.weight = WeightColumn(name, on_null="fill" if c.has_nulls else "error")
    result.notes["weight"] = f"by its name; {c.low:.6g} to {c.high:.6g}" + (f"; {_nulls(c)}" if c.has_nulls else "")


def _add_groups(profile: Profile, result: Guess) -> None:
    left_out = {entry.name for entry in result.entries if entry.left_out}
    for group, names in (("domain", _DOMAINS), ("cohort", _COHORTS), ("user", _USERS)):
        plain = {_plain(name): name for name in profile.columns if name not in left_out}
        for c in (profile.columns[plain[n]] for n in names if n in plain):
            if c.kind != "integer" or c.high >= 2**63 or (group != "user" and c.estimate > _MAX_DOMAINS):
                continue
            result.schema.groups[group] = GroupColumn(c.name, on_null="fill" if c.has_nulls else "error")
            result.notes[group] = f"{'' if profile.is_whole else 'about '}{c.estimate:,} values" + (
                f"; {_nulls(c)}, together one group" if c.has_nulls else ""
            )
            if group == "user":
                result.grouped_auc.append(group)
            elif c.estimate <= _MAX_REPORTED:
                result.by.append(group)
            break


def _plain(name: str) -> str:
    """A name in lower case with underscores: isClick and Is-Click become is_click."""
    return re.sub(r"[\s\-]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).lower()


def _common_prefix(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
