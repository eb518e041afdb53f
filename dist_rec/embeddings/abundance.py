"""How many of its directions each table uses: information abundance, exact for tables sharded in any way.

Letters: n rows, d served columns, k inner columns of a two-layer table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor

from dist_rec.embeddings.sharding import local_parts
from dist_rec.embeddings.tables import Table

BLOCK_ROWS = 65536


def information_abundance(
    state: Mapping[str, Tensor | ShardedTensor],
    tables: list[Table],
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """The information abundance of each set's share of every table, its mean over each set, and over all. Collective.

    IA(E) is the sum of the singular values of E (n, d) over the largest: 1 if all rows lie on a line through 0, d if
    all directions are used alike, nan if every value is 0 or one is not finite. Of a two-layer table E is W1 W2, what
    is served. Singular values are the roots of the eigenvalues of E^T E, a d x d sum over rows in float64 to which
    every rank adds what it holds: n d^2 operations over all ranks, d^2 numbers exchanged; those below 1e-8 of the
    largest are lost in rounding.

    Args:
        state: the model's `state_dict()`. group: a gloo group of all ranks; None is the default group.

    Returns "information_abundance", "information_abundance/<set>", "information_abundance/<set>/<table>".

    Source: Guo et al. 2023, "On the Embedding Collapse when Scaling up Recommendation Models", arXiv 2310.04400.
    """
    found: dict[str, dict[str, float]] = {}
    for table in tables:
        gram = _gram(_named(state, f".embedding_bags.{table.name}.weight"), table.width, group)
        if table.inner_dim is not None:
            second = _named(state, f".projections.{table.name}")
            assert isinstance(second, Tensor)
            projection = second.detach().double().cpu()
            gram = projection.T @ gram @ projection
        left = 0
        for block in table.blocks:
            right = left + (block.width if table.inner_dim is None else table.dim)
            name = block.name.removeprefix(f"{block.table_set}_")
            found.setdefault(block.table_set, {})[name] = abundance(gram[left:right, left:right])
            left = right
    means = {table_set: float(np.mean(list(own.values()))) for table_set, own in found.items()}
    every = [value for own in found.values() for value in own.values()]
    return {
        "information_abundance": float(np.mean(every)),
        **{f"information_abundance/{table_set}": mean for table_set, mean in means.items()},
        **{f"information_abundance/{s}/{name}": value for s, own in found.items() for name, value in own.items()},
    }


def abundance(gram: Tensor) -> float:
    """Sum over maximum of the singular values of E, by E^T E (d, d) float64; nan if E is 0 or not finite."""
    if not torch.isfinite(gram).all():  # a report must not end a run
        return float("nan")
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return float(values.sum() / values.max()) if values.max() > 0 else float("nan")


def _named(state: Mapping[str, Tensor | ShardedTensor], end: str) -> Tensor | ShardedTensor:
    (value,) = [value for name, value in state.items() if name.endswith(end)]
    return value


@torch.no_grad()
def _gram(weight: Tensor | ShardedTensor, width: int, group: dist.ProcessGroup | None) -> Tensor:
    """E^T E (width, width) float64 of a table that all ranks hold together, on every rank."""
    total = torch.zeros(width, width, dtype=torch.float64)
    for rows in _whole_rows(weight, width, group):
        block = rows.double()
        total += (block.T @ block).cpu()
    if dist.is_initialized():
        dist.all_reduce(total, group=group)
    return total


def _whole_rows(weight: Tensor | ShardedTensor, width: int, group: dist.ProcessGroup | None) -> Iterator[Tensor]:
    """(<= BLOCK_ROWS, width) blocks of rows; over all ranks, every row of the table once."""
    main = not dist.is_initialized() or dist.get_rank(group) == 0
    if isinstance(weight, ShardedTensor) and _splits_columns(weight, width):
        yield from _gathered(weight, width, main, group)
    elif isinstance(weight, ShardedTensor) or main:  # all ranks hold the same copy of a data-parallel table
        for part, *_ in local_parts(weight):
            yield from part.detach().split(BLOCK_ROWS)


def _splits_columns(weight: ShardedTensor, width: int) -> bool:
    return any(shard.shard_sizes[1] != width for shard in weight.metadata().shards_metadata)


def _gathered(weight: ShardedTensor, width: int, main: bool, group: dist.ProcessGroup | None) -> Iterator[Tensor]:
    """The rows of a table split by columns, put together block by block, on the main rank."""
    for start in range(0, weight.size(0), BLOCK_ROWS):
        rows = torch.zeros(min(BLOCK_ROWS, weight.size(0) - start), width)
        for part, row, column in local_parts(weight):
            low, high = max(start, row), min(start + len(rows), row + len(part))
            if low < high:
                rows[low - start : high - start, column : column + part.shape[1]] = part[low - row : high - row].cpu()
        dist.all_reduce(rows, group=group)
        if main:
            yield rows
