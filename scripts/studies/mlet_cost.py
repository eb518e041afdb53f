"""What projecting before the exchange costs and saves, per rank and step, on up to 1024 GPUs: a model, no measurement.

    .venv/bin/python -m scripts.studies.mlet_cost [--k 128] [--d 16] [--batch 4096] [--features 26] [--ids 1]

Prints, for row-wise and table-row-wise tables: gigabytes that a rank sends (looked-up vectors and their gradients),
GFLOP of the second layers (forward, gradients of both layers), gigabytes of partial sums written and read, and
milliseconds of these three one after the other, on H100s. Then the least d from which projecting first no longer pays.

Arms: plain d, plain k; after (k columns are exchanged, then projected); before (projected on the shard, d are
exchanged); packed, which is before without the bags that have no id on a shard, as `embeddings/mlet.py` does on a CPU
and from 32 GPUs on.

The dense part, look-ups, ids and their lengths are the same in every arm and left out. Bytes and FLOP of small cases
are held to counted ones (tests/studies/test_mlet_cost.py). Default rates are NVIDIA's published peaks for one H100 SXM:
67 TFLOP/s float32 outside of tensor cores, 3.35 TB/s memory, 450 GB/s NVLink and 50 GB/s (NDR, 400 Gbit/s) network in
one direction per GPU; real rates are lower, for thin matrices much lower.

Letters: W ranks, L of them on a node, N nodes; B rows per rank and step, F features with `ids` ids per bag, each with a
table; k inner, d served width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

FLOAT = 4  # bytes
ARMS = ("plain d", "plain k", "after", "before", "packed")
SHARDINGS = ("row_wise", "table_row_wise")


@dataclass(frozen=True)
class Job:
    """A training step. Letters as in the module's text."""

    sharding: str
    ranks: int
    per_node: int
    batch: int
    features: int
    ids: float
    k: int
    d: int

    @property
    def nodes(self) -> int:
        """N."""
        return math.ceil(self.ranks / self.per_node)

    @property
    def splits(self) -> int:
        """Ranks that hold a part of one table."""
        return self.ranks if self.sharding == "row_wise" else min(self.per_node, self.ranks)

    @property
    def tables(self) -> int:
        """Tables of which the busiest rank holds a part."""
        return self.features if self.sharding == "row_wise" else math.ceil(self.features / self.nodes)


@dataclass(frozen=True)
class Cost:
    """Of one rank, the busiest, in one step.

    Attributes:
        near, far: bytes it sends to ranks of its node, and to others. flop: of the second layers. memory: bytes of
            partial sums and of their gradients that are written and read again.
    """

    near: float
    far: float
    flop: float
    memory: float


@dataclass(frozen=True)
class Rates:
    """Of one GPU, per second."""

    flop: float = 67e12
    memory: float = 3.35e12
    near: float = 450e9
    far: float = 50e9

    def seconds(self, cost: Cost) -> float:
        """Sending, computing and memory one after the other."""
        moved = cost.near / self.near + cost.far / self.far
        return moved + cost.flop / self.flop + cost.memory / self.memory


def cost(job: Job, arm: str) -> Cost:
    """What `arm` costs in a step of `job`."""
    exchanged = job.k if arm in ("plain k", "after") else job.d
    near, far = _sent(job, exchanged)
    return Cost(near, far, _flop(job, arm), _memory(job, arm))


def _sent(job: Job, width: int) -> tuple[float, float]:
    """Bytes to the node and beyond: forward and, as much again, backward."""
    own = job.batch * job.features * width * FLOAT  # a rank's looked-up vectors
    if job.sharding == "row_wise":
        # a reduce-scatter of the global batch, all-gathered back: a ring passes all parts but one to its neighbour.
        # NCCL lays as many rings as a node has network cards, one for each GPU: a rank leaves its node on one of L
        through = 2 * own * (job.ranks - 1)
        far = through / job.per_node if job.nodes > 1 else 0.0
        return through - far, far
    # a reduce-scatter inside the node, for the tables of the node and the rows of all ranks ...
    summed = job.batch * job.nodes * job.tables * width * FLOAT  # what a rank of the node has after it
    near = 2 * summed * (job.splits - 1)
    # ... then each rank sends every node its rows; back it sends the gradients of its rows to every node
    far = summed * (job.nodes - 1) / job.nodes + own * (job.nodes - 1) / job.nodes
    return near, far


def _flop(job: Job, arm: str) -> float:
    """Of X W2, and of the gradients of X and W2: three products."""
    if arm.startswith("plain"):
        return 0.0
    bags = job.batch * job.features if arm == "after" else _bags(job, packed=arm == "packed")
    return 3 * 2 * bags * job.k * job.d


def _bags(job: Job, packed: bool) -> float:
    """Bags of the global batch that a rank has partial sums of."""
    bags = job.batch * job.ranks * job.tables
    return bags * (1 - (1 - 1 / job.splits) ** job.ids) if packed else bags


def _memory(job: Job, arm: str) -> float:
    """Partial sums are written and read, and so are their gradients; the projected ones beside them."""
    bags = _bags(job, packed=arm == "packed")
    width = job.d if arm == "plain d" else job.k
    served = 0.0 if arm.startswith("plain") else job.batch * job.features * job.d
    if arm in ("before", "packed"):
        served = job.batch * job.ranks * job.tables * job.d
    return 4 * FLOAT * (bags * width + served)


def table(job: Job, ranks: Sequence[int], rates: Rates) -> Iterator[str]:
    """A Markdown table: a row for each number of ranks and arm."""
    yield f"{job.sharding}: k = {job.k}, d = {job.d}, B = {job.batch}, F = {job.features}, {job.ids:g} id(s) per bag"
    yield ""
    yield "| GPUs | arm | GB sent in the node | GB sent beyond | GFLOP | GB of partial sums | ms | times plain d |"
    yield "| --- " * 8 + "|"
    for count in ranks:
        here = _on(job, count)
        plain = rates.seconds(cost(here, "plain d"))
        for arm in ARMS:
            c = cost(here, arm)
            seconds = rates.seconds(c)
            cells = [f"{count}", arm, f"{c.near / 1e9:.3f}", f"{c.far / 1e9:.3f}", f"{c.flop / 1e9:.1f}",
                     f"{c.memory / 1e9:.3f}", f"{1e3 * seconds:.2f}", f"{seconds / plain:.2f}"]  # fmt: skip
            yield f"| {' | '.join(cells)} |"


def break_even(job: Job, rates: Rates, arm: str) -> int | None:
    """The least served width d < k at which `arm` is no faster than projecting afterwards; None if there is none."""
    for d in range(1, job.k):
        here = Job(**{**vars(job), "d": d})
        if rates.seconds(cost(here, arm)) >= rates.seconds(cost(here, "after")):
            return d
    return None


def _on(job: Job, ranks: int) -> Job:
    return Job(**{**vars(job), "ranks": ranks})


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables and the points at which projecting first stops paying."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, default=128)
    parser.add_argument("--d", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--features", type=int, default=26)
    parser.add_argument("--ids", type=float, default=1.0, help="mean number of ids per bag")
    parser.add_argument("--per-node", type=int, default=8)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 16, 64, 256, 1024])
    for name, rate in vars(Rates()).items():
        parser.add_argument(f"--{name}", type=float, default=rate, help="per second and GPU")
    args = parser.parse_args(arguments)
    rates = Rates(**{name: getattr(args, name) for name in vars(Rates())})
    for sharding in SHARDINGS:
        job = Job(sharding, 1, args.per_node, args.batch, args.features, args.ids, args.k, args.d)
        print("\n".join(table(job, args.ranks, rates)), flush=True)
        print()
        for arm in ("before", "packed"):
            points = [(count, break_even(_on(job, count), rates, arm)) for count in args.ranks if count > 1]
            text = ", ".join(f"{count} GPUs: {'never' if d is None else f'd >= {d}'}" for count, d in points)
            print(f"{arm} stops paying at k = {args.k} from {text}")
        print()


if __name__ == "__main__":
    main()
