"""Plans the tables of a config for any number of ranks, offline: `dist-rec plan CONFIG ranks=64 [key=value ...]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_rec.config import load
from dist_rec.embeddings.sharding import describe
from dist_rec.job import run_entry
from dist_rec.recommender import build, plan_tables
from dist_rec.settings import Complaint, ConfigError
from dist_rec.training.optim import fuse_table_optimizer

USAGE = """usage: dist-rec plan CONFIG [ranks=N] [ranks_per_node=N] [device=cpu|cuda] [key=value ...]

Prints which rank would hold which part of which table, without data, GPUs or other processes; fails with what would
make it fit. Tables are planned for `device` (default: cuda), as the cluster that will train them has it.

Overrides:
  sharding.device_memory_gb=80     memory of one GPU
  sharding.host_memory_gb=200      host memory of one rank
  embeddings.sharding=row_wise     for all tables; embeddings.tables.<table>.sharding=... for one
  data.batch_size=4096             rows per rank and step, by which the planner weighs communication
"""


@dataclass
class _Cluster:
    ranks: int = 1
    ranks_per_node: int = 8
    device: str = "cuda"


def _main(arguments: Sequence[str]) -> None:
    cluster, overrides = _cluster(arguments[1:])
    config = load(arguments[0], overrides, cluster.device)
    model, tables = build(config)
    fuse_table_optimizer(model.embeddings.collection.parameters(), config.optim.tables)
    per_node = min(cluster.ranks, cluster.ranks_per_node)
    plan = plan_tables(config, model, tables, cluster.device, cluster.ranks, per_node)
    print(describe(plan, tables))


def _cluster(arguments: Sequence[str]) -> tuple[_Cluster, list[str]]:
    cluster, rest, complaints = _Cluster(), [], []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key == "device" and value in ("cpu", "cuda"):
            cluster.device = value
        elif key in ("ranks", "ranks_per_node") and value.isdigit() and int(value) > 0:
            setattr(cluster, key, int(value))
        elif key in ("device", "ranks", "ranks_per_node"):
            expected = "cpu or cuda" if key == "device" else "a whole number >= 1"
            complaints.append(Complaint(key, f"is '{value}'; expected {expected}"))
        else:
            rest.append(argument)
    if complaints:
        raise ConfigError(complaints)
    if cluster.ranks % min(cluster.ranks, cluster.ranks_per_node):
        text = f"is {cluster.ranks}, which is no multiple of ranks_per_node, {cluster.ranks_per_node}"
        raise ConfigError([Complaint("ranks", text)])
    return cluster, rest


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.plan` and `dist-rec plan`."""
    run_entry(_main, arguments, USAGE)


if __name__ == "__main__":
    main()
