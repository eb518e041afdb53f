"""The only assembly: a config becomes an embedding stage and a dense part under one root. No method is named here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingPlan

from dist_rec.config import RunConfig
from dist_rec.contract import ArchOutput, StepOutput
from dist_rec.data.batch import Batch
from dist_rec.data.views import view_key
from dist_rec.embeddings import sharding
from dist_rec.embeddings.abundance import information_abundance
from dist_rec.embeddings.stage import EmbeddingStage
from dist_rec.embeddings.tables import Table, make_tables, view_sets
from dist_rec.metrics.representations import chosen
from dist_rec.training.evaluation import Diagnostics
from dist_rec.training.optim import StepOptimizer, fuse_table_optimizer
from dist_rec.training.runtime import Runtime


class DensePart(nn.Module):
    """Arch, objective and auxiliaries: everything that is data-parallel. A model that only serves has no objective.

    TorchRec traces only modules that contain a sharded one, so what is below this module may be ordinary Python.

    Args:
        compared: representations of the arch, name -> columns, that each step of an evaluation leaves side by side.
        served: those that it leaves by name.
    """

    def __init__(
        self,
        arch: nn.Module,
        objective: nn.Module | None,
        auxiliaries: Mapping[str, nn.Module],
        precision: str,
        compared: Mapping[str, int],
        served: Sequence[str],
    ):
        super().__init__()
        self.arch: Any = arch
        self.objective: Any = objective
        self.auxiliaries = nn.ModuleDict(auxiliaries)
        self._precision = precision
        self.compared = dict(compared)
        self._served = tuple(served)
        for part in (objective, *auxiliaries.values()):
            if callable(bind := getattr(part, "bind", None)):
                bind(arch)

    def score(self, batch: Batch, tables: dict[str, Tensor]) -> ArchOutput:
        """tables: set name -> (B, F, D). What the arch makes of them; predictions (B, T) in float32."""
        with torch.autocast(batch.dense.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            output = self.arch(batch.dense, tables, batch.groups)
        return output._replace(predictions=output.predictions.float())

    def forward(self, batch: Batch, tables: dict[str, Tensor]) -> tuple[Tensor, StepOutput]:
        """tables: set name -> (B, F, D). Returns the loss to minimise (scalar, float32) and what the step leaves."""
        output = self.score(batch, tables)
        left = StepOutput(
            predictions=output.predictions.detach(),
            labels=batch.labels,
            weights=batch.weights,
            groups=batch.groups,
            losses={},
        )
        if not self.training:  # nobody asks for a loss, and one over the batches of all ranks would cost an exchange
            kept = {name: output.representations[name].detach().float() for name in self._served}
            compared = self._side_by_side(output) if self.compared else None
            return output.predictions.new_zeros(()), left._replace(compared=compared, representations=kept)
        encode = partial(self._encode, batch, tables)
        terms: dict[str, Tensor] = dict(self.objective(output, batch, encode))
        devices = [batch.dense.device] if batch.dense.device.type == "cuda" else []
        for part in self.auxiliaries.values():
            # attached or not, and with dropout in what it encodes or not, the next step draws the same numbers
            with torch.random.fork_rng(devices=devices):
                terms.update(part(output, batch, encode))
        losses = {name: term.detach() for name, term in terms.items()}
        return torch.stack(list(terms.values())).sum(), left._replace(losses=losses)

    def _encode(
        self, batch: Batch, tables: dict[str, Tensor], view: str, change: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The arch's encoding of a view, see `contract.Encode`."""
        if change is not None:
            tables = {n: change(rows) if n.endswith(view_key("", view)) else rows for n, rows in tables.items()}
        with torch.autocast(batch.dense.device.type, torch.bfloat16, enabled=self._precision == "bf16"):
            return self.arch.encode(batch, tables, view)

    def _side_by_side(self, output: ArchOutput) -> Tensor:
        return torch.cat([output.representations[name].detach().float() for name in self.compared], dim=1)


class Recommender(nn.Module):
    """The root: look up, then everything else. Both lines must stay traceable by torch.fx."""

    def __init__(self, embeddings: EmbeddingStage, dense: DensePart):
        super().__init__()
        self.embeddings = embeddings
        self.dense = dense

    def forward(self, batch: Batch) -> tuple[Tensor, StepOutput]:
        """One step on one rank's batch: (loss, detached outputs)."""
        return self.dense(batch, self.embeddings(batch.sparse))

    def logits(self, batch: Batch) -> Tensor:
        """(B, T) float32, for models that are not sharded; labels, weights and an objective are not needed."""
        return self.dense.score(batch, self.embeddings(batch.sparse)).predictions

    def represent(self, batch: Batch, name: str) -> Tensor:
        """(B, dim) float32 a representation of the arch, for models that are not sharded."""
        return self.dense.score(batch, self.embeddings(batch.sparse)).representations[name].float()


def build(config: RunConfig, table_device: str = "meta") -> tuple[Recommender, list[Table]]:
    """The unsharded model with its tables on `table_device`, and the list of its tables.

    The dense part is initialised from `run.seed` alone, so every rank and every world size starts from the same
    weights. Auxiliaries are built last, and are built and run in a fork of the generator: attached or not, the rest
    starts and trains from the same random numbers.
    """
    stage, tables = _stage(config, table_device)
    torch.manual_seed(config.run.seed)
    arch = config.model.build(config.schema)
    objective = config.objective.build(config.schema, arch.representation_dims)
    with torch.random.fork_rng(devices=[]):
        extra = {name: c.build(config.schema, arch.representation_dims) for name, c in config.attached.items()}
    compared = chosen(config.metrics.correlation, arch.representation_dims)
    by_name = ("query", "item") if config.evaluation == "retrieval" else ()
    dense = DensePart(arch, objective, extra, config.train.precision, compared, by_name)
    return Recommender(stage, dense), tables


def _stage(config: RunConfig, table_device: str) -> tuple[EmbeddingStage, list[Table]]:
    sets, views = config.model.table_sets(config.schema), config.views
    tables = make_tables(sets, config.schema, config.embeddings, views)
    stage = EmbeddingStage(
        tables,
        [*sets, *view_sets(sets, views)],
        is_weighted=config.schema.is_weighted,
        project=config.embeddings.project,
        train_projection=config.embeddings.train_projection,
        device=torch.device(table_device),
    )
    return stage, tables


def plain(config: RunConfig) -> RunConfig:
    """The config of the model that is served, on one device: single-layer tables, no auxiliaries.

    How a table pools stays; where it lies and how it is trained does not concern a server.
    """
    given = config.embeddings
    own = {name: replace(o, inner_dim=None, sharding=None, kernel=None) for name, o in given.tables.items()}
    single = replace(given, inner_dim=None, sharding="auto", kernel="auto", tables=own)
    return replace(config, auxiliary={}, embeddings=single)


def served(config: RunConfig) -> Recommender:
    """The model that `plain(config)` trains, without its objective; unsharded, its tables on the meta device."""
    stage, _ = _stage(plain(config), "meta")
    with torch.random.fork_rng(devices=[]):  # its values come from a file
        arch = config.model.build(config.schema)
    return Recommender(stage, DensePart(arch, None, {}, config.train.precision, {}, ()))


@dataclass(frozen=True)
class Distributed:
    """A model spread over the ranks, ready to train.

    Attributes:
        diagnostics: what there is to say of it at an evaluation.
    """

    model: DistributedModelParallel
    optimizer: StepOptimizer
    tables: list[Table]
    plan: ShardingPlan
    diagnostics: Diagnostics


def distribute(config: RunConfig, runtime: Runtime, saved: Mapping[str, str] | None = None) -> Distributed:
    """Builds the model, plans and shards its tables, and gives every parameter its optimiser. Collective.

    saved: table name -> sharding type of the checkpoint that will be loaded into it.
    """
    model, tables = build(config)
    compared = model.dense.compared
    fuse_table_optimizer(model.embeddings.collection.parameters(), config.optim.tables)
    plan = plan_together(config, model, tables, runtime, saved)
    sharded = sharding.shard(
        model,
        plan,
        runtime.device,
        runtime.group,
        tables=tables,
        seed=config.run.seed,
        threads=runtime.cores,
        projection_init=config.embeddings.projection_init,
    )
    # from here on random numbers (dropout) are the rank's own
    torch.manual_seed(config.run.seed + 1 + runtime.rank)

    def of_tables() -> dict[str, float]:
        asked = config.metrics.information_abundance
        return information_abundance(sharded.state_dict(), tables, runtime.control) if asked else {}

    return Distributed(sharded, StepOptimizer(sharded, config.optim), tables, plan, Diagnostics(compared, of_tables))


def plan_together(
    config: RunConfig,
    model: Recommender,
    tables: list[Table],
    runtime: Runtime,
    saved: Mapping[str, str] | None = None,
) -> ShardingPlan:
    """Rank 0's plan for the ranks of this job, for machines like its own, on every rank. Collective.

    Raises PlanError on every rank.
    """

    def plan() -> ShardingPlan:
        return plan_tables(
            config,
            model,
            tables,
            runtime.device.type,
            runtime.world_size,
            runtime.local_world_size,
            device_memory=runtime.device_memory,
            host_memory=runtime.host_memory,
            saved=saved,
        )

    return runtime.from_main(plan, sharding.PlanError)


def plan_tables(
    config: RunConfig,
    model: Recommender,
    tables: list[Table],
    device_type: str,
    world_size: int,
    local_world_size: int,
    device_memory: int | None = None,
    host_memory: int | None = None,
    saved: Mapping[str, str] | None = None,
) -> ShardingPlan:
    """The sharding plan of `model` for `world_size` ranks, made by this process alone.

    Fuse the table optimiser first: the planner then counts its state.
    """
    return sharding.make_plan(
        model,
        tables,
        config.sharding,
        device_type=device_type,
        world_size=world_size,
        local_world_size=local_world_size,
        batch_size=config.data.batch_size,
        device_memory=device_memory,
        host_memory=host_memory,
        saved=saved,
    )
