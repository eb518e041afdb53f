"""Views: other bags for some features of a batch, under keys of their own that are looked up in the same tables.

A view "a" of feature f is the key "f#a". Keys follow the schema's features in one fixed order, in evaluation too, where
they are empty: TorchRec fixes the order by the first batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from dist_rec.data.bags import empty, packed, unpacked
from dist_rec.data.batch import Batch
from dist_rec.data.ids import Ragged

Views = Mapping[str, Sequence[str]]
"""View -> the features it shows."""


def view_key(feature: str, view: str) -> str:
    """The key of a feature in a view."""
    return f"{feature}#{view}"


def feature_of(key: str) -> str:
    """The feature behind a key, of a view or not."""
    return key.partition("#")[0]


def view_keys(views: Views) -> list[str]:
    """All keys, view by view."""
    return [view_key(feature, view) for view, features in views.items() for feature in features]


def with_views(
    batch: Batch, bags: Mapping[str, Ragged], dense: Mapping[str, Tensor], groups: Mapping[str, Tensor]
) -> Batch:
    """`batch` with more keys (in the order of `bags`), dense columns of views, and groups."""
    dtype = batch.sparse.values().numpy().dtype
    is_weighted = batch.sparse.weights_or_none() is not None
    return replace(
        batch,
        sparse=packed({**unpacked(batch.sparse), **bags}, dtype, is_weighted),
        view_dense={**batch.view_dense, **dense},
        groups={**batch.groups, **groups},
    )


def with_empty_views(batch: Batch, views: Views) -> Batch:
    """`batch` with every key of `views` empty, for passes that train nothing."""
    size = len(batch.weights)
    return with_views(
        batch,
        {key: empty(size) for key in view_keys(views)},
        {view: batch.dense.new_zeros(batch.dense.shape) for view in views},
        {},
    )


def row_numbers(batch: Batch, rank: int) -> np.ndarray:
    """(B,) the place of each row in the global batch."""
    size = len(batch.weights)
    return np.arange(rank * size, (rank + 1) * size)
