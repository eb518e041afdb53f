"""What tests of sharded models share: the runtime of a rank of `run_ranks`, whole tensors from their parts, and some
steps with and without sharding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torchrec.optim import RowWiseAdagrad

from dist_rec.config import RunConfig
from dist_rec.data.batch import Batch
from dist_rec.embeddings.sharding import initialise, sharding_types
from dist_rec.recommender import build, distribute
from dist_rec.training.runtime import Runtime
from dist_rec.training.trainer import GuardedPipeline
from tests.examples import share


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


@dataclass
class Training:
    """What some steps were and did.

    Attributes:
        losses: mean over ranks, by step. before, after: every tensor of the model's state.
        plan: table -> sharding type. pipelined: `GuardedPipeline.pipelined`.
    """

    losses: list[float]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    plan: dict[str, str]
    pipelined: tuple[list[str], list[str]]


def train_unsharded(settings: RunConfig, batches: Sequence[Batch]) -> Training:
    """A step of plain torch on each of the global `batches`. The dense optimiser must be SGD."""
    model, tables = build(settings, table_device="cpu")
    initialise(model.state_dict(), tables, settings.run.seed)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dense = [p for n, p in model.named_parameters() if ".embedding_bags." not in n]
    kinds = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad}
    rule = settings.optim.tables
    extra = {} if rule.name == "sgd" else {"eps": rule.eps}
    assert settings.optim.dense.name == "sgd"
    optimizers = [
        kinds[rule.name](model.embeddings.collection.parameters(), lr=rule.lr, **extra),
        torch.optim.SGD(dense, lr=settings.optim.dense.lr),
    ]
    losses = []
    for batch in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return Training(losses, before, {n: v.clone() for n, v in model.state_dict().items()}, {}, ([], []))


def train_sharded(rank: int, world_size: int, settings: RunConfig, batches: Sequence[Batch]) -> Training:
    """The same through the real pipeline, every rank with its share of each global batch. Collective."""
    here = runtime(rank, world_size)
    parts = distribute(settings, here)
    before = whole(parts.model.state_dict())
    pipeline = GuardedPipeline(parts.model, parts.optimizer, here)
    shares = iter([share(batch, rank, world_size) for batch in batches])
    losses = []
    for _ in batches:
        output = pipeline.progress(shares)
        loss = torch.stack(list(output.losses.values())).sum()
        dist.all_reduce(loss)
        losses.append(loss.item() / world_size)
    after = whole(parts.model.state_dict())
    return Training(losses, before, after, sharding_types(parts.plan), pipeline.pipelined())


def assert_same_training(found: Training, expected: Training, what: str, tolerance: float = 1e-4) -> None:
    """Losses to 1e-5, first values bit for bit, and the *update* of every tensor to `tolerance` of its norm."""
    assert found.losses == pytest.approx(expected.losses, abs=1e-5), what
    assert set(found.before) == set(expected.before), what
    for name, start in expected.before.items():
        assert torch.equal(found.before[name], start), f"{what}: first values of {name}"
        update, wanted = found.after[name] - start, expected.after[name] - start
        if start.is_floating_point():
            assert wanted.norm() > 0, f"{what}: {name} did not train"
            error = (update - wanted).norm() / wanted.norm()
            assert error < tolerance, f"{what}: the update of {name} is off by {error:.1e}"
        else:
            assert torch.equal(update, wanted), f"{what}: {name}"
