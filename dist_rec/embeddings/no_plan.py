"""Why no plan fits the ranks of a job, and what would: arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dist_rec.embeddings.tables import SPLITS_COLUMNS, Table

GIB = 1024**3
_WITH_STATE = 1.5  # bytes a rank needs per byte of weights: optimiser state, exchange buffers, the planner's reserve
_NARROWEST = 128  # columns of the planner's shards, where sharding.min_columns does not say
_BY_ROWS = ("auto", "row_wise")


@dataclass(frozen=True)
class Room:
    """Where the tables were to go; bytes_per_rank: of GPU memory on CUDA, else of host memory."""

    ranks: int
    ranks_per_node: int
    bytes_per_rank: int
    device_type: str
    min_columns: int | None


def explain(reason: str, tables: list[Table], kinds: Mapping[str, str], room: Room) -> str:
    """The message of a PlanError: the largest table, the bytes needed and available, and what would fit.

    kinds: table name -> its sharding, "auto" where the planner may choose.
    """
    largest, total = max(tables, key=lambda t: t.num_bytes), sum(t.num_bytes for t in tables)
    key = "sharding.device_memory_gb" if room.device_type == "cuda" else "sharding.host_memory_gb"
    cures = [*_cures(tables, kinds, room), f"a larger {key} if the machine has it"]
    if room.device_type == "cuda" and largest.kernel == "fused":
        cures.append(f"embeddings.kernel: fused_uvm_caching, so that {largest.name} lives in host memory")
    return (
        f"no plan fits {len(tables)} tables on {room.ranks} rank(s): {reason}\n"
        f"  largest table: {largest.name}, {largest.num_rows:,} x {largest.width} = {largest.num_bytes / GIB:.3f} GiB, "
        f"sharding {largest.sharding}\n"
        f"  needed: {total / GIB:.3f} GiB of weights, plus optimiser state and exchange buffers\n"
        f"  available: {room.bytes_per_rank / GIB:.3f} GiB per rank ({key}), "
        f"{room.ranks * room.bytes_per_rank / GIB:.3f} GiB in all\n"
        f"  what would fit: {'; or '.join(cures)}"
    )


def _cures(tables: list[Table], kinds: Mapping[str, str], room: Room) -> Iterator[str]:
    needed = _ranks_needed(tables, kinds, room)
    if needed is not None and needed > room.ranks:
        yield f"at least {needed} ranks"
    fixed = [t for t in tables if kinds[t.name] not in _BY_ROWS]
    if not fixed:
        return
    largest = max(fixed, key=lambda t: t.num_bytes)
    for changed, what in (([largest], largest.name), (fixed, "all tables")):
        needed = _ranks_needed(tables, {**kinds, **{t.name: "row_wise" for t in changed}}, room)
        if needed is not None and max(needed, room.ranks) > 1:
            yield f"sharding row_wise for {what}" + (f" on at least {needed} ranks" if needed > room.ranks else "")
            return


def _ranks_needed(tables: list[Table], kinds: Mapping[str, str], room: Room) -> int | None:
    """At least so many ranks are needed; None if no number of them is enough."""
    replicated = sum(t.num_bytes for t in tables if kinds[t.name] == "data_parallel")
    placed = [t for t in tables if kinds[t.name] != "data_parallel"]
    left = room.bytes_per_rank / _WITH_STATE - replicated
    if left <= 0 or any(_on_one_rank(t, kinds[t.name], room) > left for t in placed):
        return None
    return max(1, math.ceil(sum(t.num_bytes for t in placed) / left))


def _on_one_rank(table: Table, kind: str, room: Room) -> float:
    """Bytes of a table that stay on one rank however many nodes there are."""
    if kind in _BY_ROWS:
        return 0.0
    if kind == "table_row_wise":
        return table.num_bytes / room.ranks_per_node
    if kind in SPLITS_COLUMNS:
        return table.num_bytes * min((room.min_columns or _NARROWEST) / table.width, 1.0)
    return table.num_bytes
