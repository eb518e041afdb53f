"""Which rank holds which part of which table: the plan, its report, the sharded model, the tables' first values."""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel, ShardingType
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import BoundsCheckMode, ModuleSharder, ParameterSharding, ShardingEnv, ShardingPlan

from dist_rec.embeddings.mlet import FactoredCollection, ShardedFactoredCollection
from dist_rec.embeddings.no_plan import GIB, Room, explain
from dist_rec.embeddings.tables import SPLITS_COLUMNS, Table
from dist_rec.settings import Complaint

BLOCK_ROWS = 16384
_PROTOTYPE_SIGMA = 0.25  # github.com/benghaem/dlrm_mlet
_AUTO = [
    ShardingType.DATA_PARALLEL.value,
    ShardingType.TABLE_WISE.value,
    ShardingType.ROW_WISE.value,
    ShardingType.TABLE_ROW_WISE.value,
]


@dataclass
class ShardingConfig:
    """The `sharding` section: what the planner may assume about the machine."""

    device_memory_gb: float | None = None  # memory per GPU; default: the GPU's own; in offline plans 32
    host_memory_gb: float | None = None  # of each rank; default: the machine's / its ranks, 128 in offline plans
    min_columns: int | None = None  # narrowest shard of a column-wise table; must divide its width

    def check(self) -> Iterator[Complaint]:
        """Complaints about the section's own settings."""
        for key in ("device_memory_gb", "host_memory_gb", "min_columns"):
            value = getattr(self, key)
            if value is not None and value <= 0:
                yield Complaint(key, f"is {value}; use a number > 0, or leave it out")
        if self.min_columns is not None and self.min_columns % 4:
            yield Complaint("min_columns", f"is {self.min_columns}; FBGEMM's fused kernels need a multiple of 4")


class PlanError(ValueError):
    """No placement satisfies the constraints; the message names the largest table and what would make it fit."""


class CollectionSharder(EmbeddingBagCollectionSharder):
    """TorchRec's sharder, offering on CPU what it offers on CUDA.

    TorchRec leaves row-wise out on CPU because gloo once had no reduce-scatter; it has one now, and the row-wise
    run time is exact there.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Every sharding of pooled tables, on every device."""
        return super().sharding_types("cuda")


class FactoredSharder(CollectionSharder):
    """The sharder of a collection with two-layer tables."""

    @property
    def module_type(self) -> type[FactoredCollection]:
        """What it shards."""
        return FactoredCollection

    def shard(
        self,
        module: FactoredCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedFactoredCollection:
        """The sharded twin, as `EmbeddingBagCollectionSharder.shard` makes it."""
        return ShardedFactoredCollection(
            module,
            params,
            env,
            self.fused_params,
            device,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
        )


def sharders() -> list[ModuleSharder[nn.Module]]:
    """The sharders a model of this framework needs; given to planner and DistributedModelParallel alike."""
    return [CollectionSharder(), FactoredSharder()]


def check_kernels(tables: list[Table], device_type: str) -> Iterator[Complaint]:
    """What FBGEMM's kernels ask of a table on each device."""
    is_cpu = device_type == "cpu"
    odd = [t for t in tables if t.width % 4 and not (is_cpu and t.sharding == "data_parallel")]
    if odd:
        text = (
            f"is {odd[0].width} columns wide, as {len(odd)} table(s) are; FBGEMM's fused kernels need a multiple of 4"
        )
        cure = "change the model's dim, or inner_dim" + (", or use sharding: data_parallel" if is_cpu else "")
        yield Complaint(f"tables.{odd[0].key}", f"{text}: {cure}")
    for table in tables:
        if is_cpu and table.kernel not in ("auto", "fused"):
            text = f"is {table.kernel} for table '{table.name}', which needs a GPU; on CPU use auto or fused"
            yield Complaint("kernel", text)


def check_columns(tables: list[Table], config: ShardingConfig) -> Iterator[Complaint]:
    """The narrowest shard must divide every table that is split by columns."""
    for table in tables:
        if config.min_columns is not None and table.sharding in SPLITS_COLUMNS and table.width % config.min_columns:
            text = f"is {config.min_columns}, which does not divide the {table.width} columns of table '{table.name}'"
            yield Complaint("min_columns", text)


def check_splittable(tables: list[Table], table_optimizer: str) -> Iterator[Complaint]:
    """A table split by columns has one row-wise Adagrad state per shard: it would not train as the unsharded table."""
    if table_optimizer != "rowwise_adagrad":
        return
    for table in tables:
        if table.sharding in SPLITS_COLUMNS:
            yield Complaint(
                f"tables.{table.key}.sharding",
                f"is {table.sharding}, but row-wise Adagrad keeps one state per row and each column shard would keep "
                "its own, so sharded would differ from unsharded; use optim.tables.name: adagrad, or row_wise",
            )


def make_plan(
    model: nn.Module,
    tables: list[Table],
    config: ShardingConfig,
    *,
    device_type: str,
    world_size: int,
    local_world_size: int,
    batch_size: int,
    device_memory: int | None = None,
    host_memory: int | None = None,
    saved: Mapping[str, str] | None = None,
) -> ShardingPlan:
    """TorchRec's plan for `model`, whose tables may be on the meta device.

    This runs in one process, for any world size: ranks that plan for themselves could come to different plans.

    Args:
        device_memory: bytes of each GPU, for a config that does not say. host_memory: bytes of each rank, likewise.
        saved: table name -> sharding type of the checkpoint that will be loaded. A table that the planner may place
            freely then stays replicated or sharded as it was, because its optimiser state cannot change between them.

    Raises:
        PlanError: no placement fits, with the largest table, the bytes needed and available, and what would help.
    """
    topology = Topology(
        world_size=world_size,
        local_world_size=local_world_size,
        compute_device=device_type,
        hbm_cap=_bytes(config.device_memory_gb) or device_memory,
        ddr_cap=_bytes(config.host_memory_gb) or host_memory,
    )
    allowed = {t.name: _allowed(t, (saved or {}).get(t.name)) for t in tables}
    constraints = {t.name: _constraints(t, allowed[t.name], config, device_type, batch_size) for t in tables}
    planner = EmbeddingShardingPlanner(
        topology=topology, batch_size=batch_size, constraints=constraints, debug=False, stats=[]
    )
    logging.getLogger().addFilter(_is_of_use)
    try:
        return planner.plan(model, sharders())
    except PlannerError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else error.error_type.value
        storage = topology.devices[0].storage
        each = storage.hbm if device_type == "cuda" else storage.ddr
        room = Room(world_size, local_world_size, each, device_type, config.min_columns)
        kinds = {name: kinds[0] if len(kinds) == 1 else "auto" for name, kinds in allowed.items()}
        raise PlanError(explain(reason, tables, kinds, room)) from error
    finally:
        logging.getLogger().removeFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    """TorchRec warns on the root logger of every data-parallel table, which by design has no sharding spec."""
    return not record.getMessage().startswith("Sharding spec not found")


def _allowed(table: Table, saved: str | None) -> list[str]:
    if table.sharding != "auto":
        return [table.sharding]
    if saved is None:
        return _AUTO
    replicated = ShardingType.DATA_PARALLEL.value
    return [replicated] if saved == replicated else [kind for kind in _AUTO if kind != replicated]


def _constraints(
    table: Table, allowed: list[str], config: ShardingConfig, device_type: str, batch_size: int
) -> ParameterConstraints:
    if table.sharding == "data_parallel":
        kernels = [EmbeddingComputeKernel.DENSE.value]
    elif table.kernel == "auto":
        kernels = [EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value]
        if device_type == "cuda":
            kernels += [EmbeddingComputeKernel.FUSED_UVM_CACHING.value, EmbeddingComputeKernel.FUSED_UVM.value]
    else:
        kernels = [table.kernel]
    return ParameterConstraints(
        sharding_types=allowed,
        compute_kernels=kernels,
        min_partition=config.min_columns,
        pooling_factors=list(table.mean_lengths),
        num_poolings=[1.0] * len(table.features),
        batch_sizes=[batch_size] * len(table.features),
        # the loader has checked every id already, naming feature, file and row group
        bounds_check_mode=BoundsCheckMode.NONE,
    )


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * GIB)


def describe(plan: ShardingPlan, tables: list[Table]) -> str:
    """The plan as an aligned table, one line per embedding table, followed by the bytes of weights per rank."""
    by_name = {t.name: t for t in tables}
    rows = [("table", "rows", "width", "pooling", "sharding", "kernel", "ranks", "MiB")]
    per_rank: dict[int, float] = {}
    for _, module_plan in plan.plan.items():
        for name, sharding in module_plan.items():
            table, ranks = by_name[name], sharding.ranks or []
            shards = sharding.sharding_spec.shards if sharding.sharding_spec is not None else []
            for shard in shards:
                size = math.prod(shard.shard_sizes) * 4 / 2**20
                per_rank[shard.placement.rank()] = per_rank.get(shard.placement.rank(), 0.0) + size
            if not shards:
                for rank in ranks:
                    per_rank[rank] = per_rank.get(rank, 0.0) + table.num_bytes / 2**20
            rows.append(
                (name, f"{table.num_rows:,}", _width(table), table.pooling, sharding.sharding_type,
                 sharding.compute_kernel, _ranges(ranks), f"{table.num_bytes / 2**20:.1f}")
            )  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"MiB of weights: {_loads(per_rank)}"])


def _loads(per_rank: Mapping[int, float]) -> str:
    """Who holds how much; ranks with the same load are named together."""
    alike: dict[str, list[int]] = {}
    for rank, size in sorted(per_rank.items()):
        alike.setdefault(f"{size:.1f}", []).append(rank)
    return ", ".join(f"rank {_ranges(ranks)}: {size}" for size, ranks in alike.items())


def _width(table: Table) -> str:
    return str(table.dim) if table.inner_dim is None else f"{table.inner_dim} -> {table.dim}"


def _ranges(ranks: list[int]) -> str:
    """Ascending, with runs written as first-last: 0-3,7."""
    runs: list[list[int]] = []
    for rank in sorted(set(ranks)):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def sharding_types(plan: ShardingPlan) -> dict[str, str]:
    """table name -> its sharding type in the plan."""
    return {name: s.sharding_type for p in plan.plan.values() for name, s in p.items()}


def shard(
    model: nn.Module,
    plan: ShardingPlan,
    device: torch.device,
    process_group: dist.ProcessGroup,
    *,
    tables: list[Table],
    seed: int,
    threads: int = 1,
    projection_init: str = "scaled",
) -> DistributedModelParallel:
    """`model` with its tables sharded by `plan` and filled, and its dense part data-parallel."""
    env = ShardingEnv.from_process_group(process_group)
    sharded = DistributedModelParallel(model, env=env, device=device, plan=plan, sharders=sharders())
    initialise(sharded.state_dict(), tables, seed, threads, projection_init)
    _fix_buckets(sharded)
    return sharded


def _fix_buckets(model: nn.Module) -> None:
    """Makes DDP sum gradients in the same order in every step.

    By itself it packs them anew after the first step of a process, and a ring of three or more ranks then adds the
    same numbers in another order: the first step after a resume would differ from the uninterrupted run's.
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.reducer._push_all_rebuilt_params()
            module.reducer._rebuild_buckets()


def initialise(
    state: dict[str, Tensor | ShardedTensor],
    tables: list[Table],
    seed: int,
    threads: int = 1,
    projection_init: str = "scaled",
) -> None:
    """Fills every table in place with values that depend on (seed, table set and table, row, column of the set) alone.

    So any layout and sharding on any number of ranks and on any device starts from the same values. (TorchRec's own
    hook draws from the rank's generator: with one seed everywhere all row-wise shards are identical, with a seed per
    rank N ranks differ from 1.)
    """
    with ThreadPoolExecutor(threads) as pool:  # a generator is serial: some 400 million values a second per thread
        for key, value in state.items():
            for table in tables:
                if key.endswith(f".{table.name}.weight"):
                    for tensor, row, column in local_parts(value):
                        blocks = range(row // BLOCK_ROWS, -(-(row + tensor.shape[0]) // BLOCK_ROWS))
                        list(pool.map(partial(_fill, tensor.detach(), table, row, column, seed), blocks))
                elif key.endswith(f".projections.{table.name}"):
                    assert isinstance(value, Tensor)
                    _fill_projection(value.detach(), table, seed, projection_init)


def _fill_projection(projection: Tensor, table: Table, seed: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{table.name}/projection".encode()))
    scale = _PROTOTYPE_SIGMA if kind == "prototype" else table.width**-0.5
    projection.copy_(torch.randn(projection.shape, generator=generator) * scale)


def local_parts(value: Tensor | ShardedTensor) -> list[tuple[Tensor, int, int]]:
    """(tensor, first row, first column) of each part of a table that this rank holds."""
    if isinstance(value, ShardedTensor):
        return [(s.tensor, s.metadata.shard_offsets[0], s.metadata.shard_offsets[1]) for s in value.local_shards()]
    return [(value, 0, 0)]


def _fill(part: Tensor, table: Table, first_row: int, first_column: int, seed: int, block: int) -> None:
    rows, columns = part.shape
    start, stop = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, table.num_rows)
    low, high = max(start, first_row), min(stop, first_row + rows)
    left = 0
    for name, width in ((b.name, b.width) for b in table.blocks):
        begin, end = max(left, first_column), min(left + width, first_column + columns)
        if begin < end:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}/{block}".encode()))
            values = torch.empty(stop - start, width)
            values.uniform_(-table.init_bound, table.init_bound, generator=generator)
            source = values[low - start : high - start, begin - left : end - left]
            part[low - first_row : high - first_row, begin - first_column : end - first_column].copy_(source)
        left += width
