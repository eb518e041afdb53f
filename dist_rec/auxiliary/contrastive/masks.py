"""Which features each of two views hides: one draw for the whole global batch, a new one every step.

If ranks masked differently, the mask itself would tell an item from another rank's negatives. Letters: k maskable
features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dist_rec.data.draws import Draws
from dist_rec.data.schema import Schema
from dist_rec.settings import Complaint


@dataclass
class Masking:
    """How features of an item are masked. A masked feature looks nothing up: its bag is empty, its vector 0."""

    # cfm: a feature drawn at random and those that say most about it, in one view; all others in the other view.
    # rfm: a random half in one view. none: nothing, in either
    masking: Literal["cfm", "rfm", "none"] = "cfm"
    # cfm: seed_and_half masks the drawn feature and floor(k / 2) more, as in the paper's text; half masks floor(k / 2)
    # in all. The other view masks the rest
    masked: Literal["seed_and_half", "half"] = "seed_and_half"
    complementary: bool = True  # rfm: the second view masks what the first shows; else a random half of its own
    # the maskable ones, which the model must read; default: all sparse features of the item, its id among them. Dense
    # columns are never masked
    features: list[str] | None = None
    hidden: list[str] = field(default_factory=list)  # features that neither view shows, for example the id

    def maskable(self, schema: Schema) -> list[str]:
        """The k features in the schema's order."""
        wanted = schema.item_features() if self.features is None else self.features
        return [name for name in schema.item_features() if name in wanted and name not in self.hidden]

    def check_masking(self, schema: Schema) -> Iterator[Complaint]:
        """Complaints about the features named, and about too few of them."""
        known = schema.item_features()
        for key, names in (("features", self.features or []), ("hidden", self.hidden)):
            for name in names:
                if name not in known:
                    yield Complaint(key, f"names '{name}', which is no feature of the item; known: {', '.join(known)}")
        if problem := features_problem(self, schema):
            yield Complaint("features", problem)


def features_problem(masking: Masking, schema: Schema) -> str | None:
    """What is wrong with the number of maskable features, or None."""
    names = masking.maskable(schema)
    needed = {"cfm": 3, "rfm": 2, "none": 0}[masking.masking]
    if len(names) >= needed:
        return None
    have = f"gives {len(names)} maskable feature(s) ({', '.join(names) or 'none'})"
    if masking.masking == "cfm":
        return f"{have}; cfm needs 3 or more, as with 2 one view would mask both: join more columns, or use rfm or none"
    return f"{have}; rfm needs 2 or more, one for each view: join more columns, or use masking: none"


def source(feature: str, schema: Schema) -> str:
    """The column of the item table behind a feature of the item."""
    assert schema.items is not None
    return schema.items.key if feature == schema.items.feature else schema.sparse[feature].column or feature


def masked_features(
    masking: Masking, names: Sequence[str], correlation: Sequence[Sequence[float]], draws: Draws
) -> tuple[set[str], set[str]]:
    """What the first and the second view mask, of the k `names`. correlation: k x k, used by cfm."""
    count, half = len(names), len(names) // 2
    if masking.masking == "none":
        return set(), set()
    if masking.masking == "rfm":
        order = draws.order(count, "features")
        first = {names[i] for i in order[:half]}
        if masking.complementary:
            return first, set(names) - first
        return first, {names[i] for i in draws.order(count, "second features")[:half]}
    seed = int(draws.order(count, "features")[0])
    others = sorted((i for i in range(count) if i != seed), key=lambda i: -correlation[seed][i])
    kept = others[: half if masking.masked == "seed_and_half" else half - 1]
    first = {names[i] for i in (seed, *kept)}
    return first, set(names) - first


def matrix(names: Sequence[str], schema: Schema, correlation: Mapping[str, Mapping[str, float]]) -> list[list[float]]:
    """k x k correlation of the features' columns, 0 on the diagonal and where nothing is said."""
    columns = [source(name, schema) for name in names]
    return [[correlation.get(a, {}).get(b, 0.0) if a != b else 0.0 for b in columns] for a in columns]
