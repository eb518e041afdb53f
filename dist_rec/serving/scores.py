"""The columns in which predictions leave the framework."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from dist_rec.data.schema import Schema


def score_names(schema: Schema) -> list[str]:
    """Names of the columns that `score_columns` gives."""
    names = []
    for label, column in schema.labels.items():
        names += [f"logit_{label}", *([f"probability_{label}"] if column.kind == "binary" else [])]
    return names


def score_columns(logits: NDArray[np.float32], schema: Schema) -> dict[str, NDArray[np.float32]]:
    """logits: (n, T). Per label a column logit_<label>, and for a binary one probability_<label>; each (n,)."""
    columns = {}
    for i, (label, column) in enumerate(schema.labels.items()):
        columns[f"logit_{label}"] = logits[:, i]
        if column.kind == "binary":
            columns[f"probability_{label}"] = torch.from_numpy(logits[:, i]).sigmoid().numpy()
    return columns
