"""A batch's KeyedJaggedTensor as bags by feature, and back: for what is added to a batch on the loader's threads.

Letters: B bags of each feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from dist_rec.data.ids import Ragged


def unpacked(sparse: KeyedJaggedTensor) -> dict[str, Ragged]:
    """The bags of each feature, as views."""
    keys, counts = sparse.keys(), sparse.length_per_key()
    lengths = sparse.lengths().numpy().reshape(len(keys), -1)
    values, weights = sparse.values().numpy(), sparse.weights_or_none()
    stops, result = list(accumulate(counts)), {}
    for key, own, count, stop in zip(keys, lengths, counts, stops, strict=True):
        here = slice(stop - count, stop)
        result[key] = Ragged(own, values[here], None if weights is None else weights.numpy()[here])
    return result


def packed(bags: Mapping[str, Ragged], dtype: np.dtype, is_weighted: bool) -> KeyedJaggedTensor:
    """One KeyedJaggedTensor with the features in the order of `bags`, each with B bags.

    dtype: of the ids. is_weighted: whether every id carries a weight, 1 where a feature has none.
    """
    counts = [len(b.values) for b in bags.values()]
    lengths = np.stack([b.lengths for b in bags.values()]).astype(np.int32, copy=False)
    values = np.concatenate([b.values for b in bags.values()]).astype(dtype, copy=False)
    weights = None
    if is_weighted:
        parts = [np.ones(len(b.values), np.float32) if b.weights is None else b.weights for b in bags.values()]
        weights = torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False))
    # with counts and stride given, TorchRec never has to fetch them back from a GPU
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.from_numpy(values),
        weights=weights,
        lengths=torch.from_numpy(lengths.reshape(-1)),
        stride=lengths.shape[1],
        length_per_key=counts,
        offset_per_key=list(accumulate(counts, initial=0)),
    )


def empty(size: int) -> Ragged:
    """`size` bags without an id."""
    return Ragged(np.zeros(size, np.int32), np.empty(0, np.int32), None)
