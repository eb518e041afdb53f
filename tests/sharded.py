"""What tests of sharded models share: the runtime of a rank of `run_ranks`, and whole tensors from their parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from dist_rec.training.runtime import Runtime


def runtime(rank: int, world_size: int) -> Runtime:
    """The runtime of a rank on this one machine."""
    group = dist.group.WORLD
    assert group is not None
    return Runtime(rank, world_size, world_size, torch.device("cpu"), group, group)


Part = tuple[tuple[int, ...], tuple[int, ...], torch.Tensor]
"""(size of the whole, place of the part in it, the part)."""


def local(tree: Mapping[str, Any], prefix: str = "") -> dict[str, list[Part]]:
    """Copies of what this rank holds of every tensor of a nested mapping, by its path."""
    found: dict[str, list[Part]] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        if isinstance(value, Mapping):
            found |= local(value, path)
        elif hasattr(value, "local_shards"):
            found[path] = [
                (tuple(value.size()), tuple(s.metadata.shard_offsets), s.tensor.detach().clone())
                for s in value.local_shards()
            ]
        elif isinstance(value, torch.Tensor):
            found[path] = [(tuple(value.shape), (0,) * value.dim(), value.detach().clone())]
    return found


def whole(tree: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Every tensor of a nested mapping, put together from the parts of all ranks. Collective.

    No torchrec and no checkpoint code has a part in this. What several ranks hold must be the same on all of them.
    """
    ranks: list[dict[str, list[Part]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(ranks, local(tree))
    found: dict[str, torch.Tensor] = {}
    written: dict[str, torch.Tensor] = {}
    for parts in ranks:
        for path, pieces in parts.items():
            for size, place, piece in pieces:
                result = found.setdefault(path, torch.zeros(size, dtype=piece.dtype))
                seen = written.setdefault(path, torch.zeros(size, dtype=torch.bool))
                here = tuple(slice(start, start + n) for start, n in zip(place, piece.shape, strict=True))
                assert torch.equal(result[here][seen[here]], piece[seen[here]]), f"{path} differs between ranks"
                result[here], seen[here] = piece, True
    missing = [path for path, seen in written.items() if not seen.all()]
    assert not missing, f"no rank has all of {missing}"
    return found
