"""Sharded equals unsharded: losses, and updates of every parameter, for every sharding, optimiser and pooling.

Updates are compared, not parameters: a wrong factor on a small gradient moves a parameter by less than any tolerance.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torchrec.optim import RowWiseAdagrad

from dist_rec.config import RunConfig
from dist_rec.embeddings.sharding import initialise, local_parts, sharding_types
from dist_rec.recommender import build, distribute
from dist_rec.training.runtime import Runtime
from dist_rec.training.trainer import GuardedPipeline
from tests.examples import config, global_batch, share
from tests.ranks import run_ranks

STEPS, ROWS = 6, 12
KINDS = ["table_wise", "row_wise", "column_wise", "table_row_wise", "data_parallel"]
MIXED = {"user": "row_wise", "items": "table_wise", "tags": "column_wise", "hour": "data_parallel"}
MIXED_ROWS = {"user": "row_wise", "items": "table_row_wise", "tags": "table_wise", "hour": "data_parallel"}


def _config(sharding: str | dict[str, str], pooling: str, optimizer: str, project: str | None = None) -> RunConfig:
    per_table = sharding if isinstance(sharding, dict) else dict.fromkeys(MIXED, sharding)
    return config(
        embeddings={
            "pooling": pooling,
            "tables": {t: {"sharding": s} for t, s in per_table.items()},
            # "hour" has too few rows to be factored and stays a plain table beside the two-layer ones
            **({"inner_dim": 16, "project": project} if project else {}),
        },
        sharding={"min_columns": 4},
        optim={"tables": {"name": optimizer, "lr": 0.1}, "dense": {"name": "sgd", "lr": 0.1}},
        model={"name": "dlrm", "dim": 8, "bottom": [16], "top": [16]},
    )


def _unsharded(settings: RunConfig) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, initial and final parameters of plain torch on the whole batches."""
    model, tables = build(settings, table_device="cpu")
    initialise(model.state_dict(), tables, settings.run.seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dense = [p for n, p in model.named_parameters() if ".embedding_bags." not in n]
    kinds = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rowwise_adagrad": RowWiseAdagrad}
    rule = settings.optim.tables
    extra = {} if rule.name == "sgd" else {"eps": rule.eps}
    optimizers = [
        kinds[rule.name](model.embeddings.collection.parameters(), lr=rule.lr, **extra),
        torch.optim.SGD(dense, lr=settings.optim.dense.lr),
    ]
    losses = []
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, _ = model(global_batch(settings.schema, step, ROWS))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses, before, {name: p.detach().clone() for name, p in model.named_parameters()}


def _full(value, world_size: int) -> torch.Tensor:
    """The whole tensor of a (sharded) entry of a state dict, on every rank."""
    if not hasattr(value, "local_shards"):
        return value.detach().clone()
    whole = torch.zeros(value.size())
    for part, row, column in local_parts(value):
        whole[row : row + part.shape[0], column : column + part.shape[1]] = part.detach()
    dist.all_reduce(whole)
    return whole


def _runtime(rank: int, world_size: int) -> Runtime:
    group = dist.group.WORLD
    return Runtime(rank, world_size, world_size, torch.device("cpu"), group, group)


def _sharded(rank: int, world_size: int, cases: list[tuple]) -> list[tuple]:
    """Per case: losses, initial and final parameters, the plan, and what was pipelined."""
    results = []
    for case in cases:
        settings = _config(*case)
        runtime = _runtime(rank, world_size)
        parts = distribute(settings, runtime)
        before = {n: _full(v, world_size) for n, v in parts.model.state_dict().items()}
        pipeline = GuardedPipeline(parts.model, parts.optimizer, runtime)
        batches = iter([share(global_batch(settings.schema, s, ROWS), rank, world_size) for s in range(STEPS)])
        losses = []
        for _ in range(STEPS):
            output = pipeline.progress(batches)
            loss = torch.stack(list(output.losses.values())).sum()
            dist.all_reduce(loss)
            losses.append(loss.item() / world_size)
        after = {n: _full(v, world_size) for n, v in parts.model.state_dict().items()}
        results.append((losses, before, after, sharding_types(parts.plan), pipeline.pipelined()))
    return results


CASES = [(kind, pooling, "sgd") for kind in KINDS for pooling in ("sum", "mean")]
CASES += [(kind, "sum", "adagrad") for kind in KINDS]
CASES += [(kind, "mean", "rowwise_adagrad") for kind in KINDS if kind != "column_wise"]
CASES += [(MIXED, "mean", "sgd"), (MIXED, "sum", "adagrad"), (MIXED_ROWS, "mean", "rowwise_adagrad")]
CASES += [(kind, "mean", "sgd", "before") for kind in KINDS if kind != "column_wise"]
CASES += [(kind, "sum", "rowwise_adagrad", "after") for kind in KINDS if kind != "column_wise"]
CASES += [("column_wise", "sum", "sgd", "after"), (MIXED_ROWS, "sum", "adagrad", "before")]
CASES += [(MIXED_ROWS, "mean", "sgd", "after")]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_and_updates_equal_unsharded_torch(world_size):
    for case, result in zip(CASES, run_ranks(_sharded, world_size, CASES)[0], strict=True):
        losses, before, after, plan, _ = result
        expected_losses, expected_before, expected_after = _unsharded(_config(*case))
        wanted = case[0] if isinstance(case[0], dict) else dict.fromkeys(MIXED, case[0])
        assert plan == {f"main_{table}": kind for table, kind in wanted.items()}, case
        assert losses == pytest.approx(expected_losses, abs=1e-5), case
        assert set(before) == set(expected_before)
        for name, start in expected_before.items():
            assert torch.equal(before[name], start), f"{case}: initial {name}"
            update, expected = after[name] - start, expected_after[name] - start
            assert expected.norm() > 0, f"{case}: {name} did not train"
            error = (update - expected).norm() / expected.norm()
            assert error < 1e-4, f"{case} on {world_size} ranks: the update of {name} is off by {error:.1e}"


def test_the_collection_is_pipelined():
    cases = [(MIXED_ROWS, "mean", "sgd"), (MIXED_ROWS, "mean", "sgd", "before")]
    for results in run_ranks(_sharded, 2, cases):
        for *_, (inside, every) in results:
            assert every
            assert inside == every
