"""A batch size per feature (TorchRec's VBE): two-layer tables train as unsharded ones do, pipelined.

Only the distinct rows of a feature are looked up, and an index spreads them over the rows of the batch. dist_rec's own
loader does not send such batches; models built on the collection may.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from dist_rec.embeddings.mlet import FactoredCollection
from dist_rec.embeddings.sharding import local_parts, sharders
from tests.ranks import run_ranks
from tests.sharded import whole

IDS, K, D, ROWS, LR = 23, 12, 4, 6, 0.05
TABLES = {"a": True, "b": False, "c": True}  # name -> whether it has two layers


class _Loss(nn.Module):
    """A loss over the looked-up vectors that differs by row and column."""

    def forward(self, pooled: KeyedTensor) -> Tensor:
        looked_up = pooled.to_dict()  # its own order of features is the plan's
        values = torch.cat([looked_up[name] for name in TABLES], dim=1)
        return (values * torch.linspace(0, 1, values.numel()).view_as(values)).sin().sum()


class _Model(nn.Module):
    """The collection and the loss; both lines can be traced by a pipeline."""

    def __init__(self) -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(name=n, num_embeddings=IDS, embedding_dim=K if two else D, feature_names=[n])
            for n, two in TABLES.items()
        ]
        self.projections = nn.ParameterDict({n: nn.Parameter(torch.empty(K, D)) for n, two in TABLES.items() if two})
        layers = dict(self.projections.items())
        self.collection = FactoredCollection(configs, layers, is_weighted=False, device=torch.device("cpu"))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.loss = _Loss()

    def forward(self, features: KeyedJaggedTensor) -> tuple[Tensor, Tensor]:
        loss = self.loss(self.collection(features))
        return loss, loss.detach()


def _features(rank: int, kinds: dict[str, str]) -> KeyedJaggedTensor:
    """Another number of distinct rows for every feature, and where all tables lie whole on a rank, for every rank.

    (TorchRec gathers the gradients of tables that are split by rows with an all-gather that gloo has for equal sizes.)
    """
    other = rank if set(kinds.values()) == {"table_wise"} else 0
    generator = torch.Generator().manual_seed(rank)
    distinct = [2 + (other + f) % 3 for f in range(len(TABLES))]
    lengths = torch.randint(0, 4, (sum(distinct),), generator=generator, dtype=torch.int32)
    spread = torch.stack([torch.randint(0, n, (ROWS,), generator=generator) for n in distinct])
    return KeyedJaggedTensor(
        keys=list(TABLES),
        values=torch.randint(0, IDS, (int(lengths.sum()),), generator=generator),
        lengths=lengths,
        stride_per_key_per_rank=[[n] for n in distinct],
        inverse_indices=(list(TABLES), spread),
    )


def _train(rank: int, world_size: int, kinds: dict[str, str]) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final parameters of three steps of SGD."""
    model = _Model()
    initial = {name: value.detach().clone() for name, value in model.state_dict().items()}
    _apply_optimizer_in_backward(torch.optim.SGD, model.collection.parameters(), {"lr": LR})
    topology = Topology(world_size=world_size, local_world_size=world_size, compute_device="cpu")
    constraints = {name: ParameterConstraints(sharding_types=[kind]) for name, kind in kinds.items()}
    plan = EmbeddingShardingPlanner(topology=topology, constraints=constraints).plan(model, sharders())
    env = ShardingEnv.from_process_group(dist.group.WORLD)
    sharded = DistributedModelParallel(model, env=env, device=torch.device("cpu"), plan=plan, sharders=sharders())
    for name, value in sharded.state_dict().items():
        for part, row, column in local_parts(value) if value.dim() else []:
            here = initial[name][row : row + part.shape[0], column : column + part.shape[1]]
            part.detach().copy_(here)
    dense = torch.optim.SGD([p for n, p in sharded.named_parameters() if "projections." in n], lr=LR)
    pipeline = TrainPipelineSparseDist(sharded, dense, torch.device("cpu"))
    batches = iter([_features(rank, kinds) for _ in range(3)])
    losses = []
    for _ in range(3):
        total = pipeline.progress(batches).clone()
        assert [m.forward.name for m in pipeline._pipelined_modules] == ["collection"]
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses, whole(sharded.state_dict())


def _unsharded(world_size: int, kinds: dict[str, str]) -> tuple[list[float], dict[str, Tensor]]:
    model, losses = _Model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.stack([model(_features(rank, kinds))[0] for rank in range(world_size)]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model.state_dict()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    "kinds",
    [
        dict.fromkeys(TABLES, "row_wise"),
        dict.fromkeys(TABLES, "table_wise"),
        dict.fromkeys(TABLES, "table_row_wise"),
        {"a": "row_wise", "b": "table_wise", "c": "table_wise"},
    ],
    ids=["row_wise", "table_wise", "table_row_wise", "mixed"],
)
def test_it_trains_as_unsharded(world_size, kinds):
    losses, found = run_ranks(_train, world_size, kinds)[0]
    expected_losses, expected = _unsharded(world_size, kinds)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    initial = _Model().state_dict()
    for name, right in expected.items():
        update, moved = found[name] - initial[name], right - initial[name]
        assert moved.norm() > 0.1
        assert (update - moved).norm() < 1e-4 * moved.norm(), name


def _refused(rank: int, world_size: int) -> str:
    with pytest.raises(NotImplementedError) as error:
        _train(rank, world_size, dict.fromkeys(TABLES, "data_parallel"))
    return str(error.value)


def test_data_parallel_tables_refuse_it():
    """TorchRec's CPU kernel for them has no such batches, also without two layers."""
    assert "takes no batch sizes per feature; shard them table-wise" in run_ranks(_refused, 1)[0]
