"""One pass over a split, with every rank's rows gathered before a metric is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from dist_rec.contract import StepOutput
from dist_rec.data.batch import Batch
from dist_rec.data.ids import Ragged
from dist_rec.data.loader import Loader
from dist_rec.data.schema import Schema
from dist_rec.metrics.compute import MetricsConfig, compute
from dist_rec.metrics.representations import Moments, describe
from dist_rec.metrics.retrieval import RetrievalMetrics, report
from dist_rec.metrics.rows import Rows, RowStore
from dist_rec.training.retrieval import JUDGED, RetrievalTask, Search, item_vectors, listed
from dist_rec.training.runtime import Runtime


@dataclass
class EvaluateConfig:
    """The `evaluate` section: what `dist-rec evaluate` does with a finished or running training's checkpoints."""

    split: Literal["train", "validation", "test"] = "test"
    step: int | None = None  # which checkpoint; default: the best one if early stopping noted one, else the newest
    predictions: str | None = None  # write the rows (logits, labels, weight, groups) to this Parquet file


@dataclass(frozen=True)
class Diagnostics:
    """What an evaluation says of a model besides its metrics.

    Attributes:
        compared: the representations that a step keeps, name -> columns, in their order there.
        tables: collective; name -> value.
    """

    compared: Mapping[str, int] = field(default_factory=dict)
    tables: Callable[[], dict[str, float]] = dict


class Evaluation(NamedTuple):
    """What one pass over a split gives.

    Attributes:
        metrics: the same on every rank. rows: what they were computed from, see `collect`.
        policies: what the schema's policies did to values of the split, over all ranks (see `data.ids.PolicyCounts`).
        diagnostics: the same on every rank; empty if none were asked for.
    """

    metrics: dict[str, float]
    rows: Rows | None
    policies: dict[str, int]
    diagnostics: dict[str, float]


def predict(model: DistributedModelParallel, loader: Loader, runtime: Runtime) -> Iterator[StepOutput]:
    """What each batch of one pass over `loader` leaves, as `forward` gives it; the loader is closed at the end."""
    try:
        yield from forward(model, iter(loader), loader.batches_left or 0, runtime)
    finally:
        loader.close()


def forward(
    model: DistributedModelParallel, batches: Iterator[Batch], count: int, runtime: Runtime
) -> Iterator[StepOutput]:
    """What each of `count` batches leaves, on the device. Collective.

    The model must not be attached to a pipeline. It is put in eval mode and back. Go through all of them: a rank that
    stops early leaves the others waiting.
    """
    training = model.training
    model.eval()
    # in eval mode TorchRec's training pipeline only overlaps and computes; it asks nothing of an optimiser
    pipeline = TrainPipelineSparseDist(model, None, runtime.device, execute_all_batches=True)
    try:
        for _ in range(count):
            with torch.no_grad():  # not around the yield: it would hold in the caller's code too
                output = pipeline.progress(batches)
            yield output
    finally:
        pipeline.detach()
        model.train(training)


def collect(
    model: DistributedModelParallel,
    loader: Loader,
    num_labels: int,
    groups: Sequence[str],
    runtime: Runtime,
    note: Callable[[StepOutput], None] | None = None,
) -> Rows | None:
    """All rows of one pass over `loader` with their predictions, on rank 0; see `predict`. Collective.

    They are in the order of the loader: without shuffle that of the files, on any number of ranks.

    Args:
        note: is shown every batch's output on the way.
    """
    store = RowStore(num_labels=num_labels, groups=groups)
    for output in predict(model, loader, runtime):
        store.append(output)
        if note is not None:
            note(output)
    return store.merged(runtime.control)


def evaluate(
    model: DistributedModelParallel,
    loader: Loader,
    schema: Schema,
    config: MetricsConfig,
    runtime: Runtime,
    groups: Sequence[str] | None = None,
    diagnostics: Diagnostics = Diagnostics(),
    task: RetrievalTask | None = None,
) -> Evaluation:
    """Evaluates one pass over `loader`; see `collect`. Collective.

    Args:
        groups: the groups to keep with the rows; by default those that the metrics need.
        diagnostics: what else to say of the model.
        task: what is searched, for a model that is judged by retrieval.
    """
    moments = Moments()

    def note(output: StepOutput) -> None:
        if output.compared is not None:
            moments.add(output.compared, output.weights)

    metrics: dict[str, float] | None = None
    if task is not None:
        rows = _searched(model, loader, task, config.retrieval, runtime, groups or (), note)
        if rows is not None:
            metrics = report([rows.groups[name] for name in JUDGED], config.retrieval)
    else:
        kept = config.groups if groups is None else groups
        rows = collect(model, loader, len(schema.labels), kept, runtime, note)
        metrics = compute(rows, schema, config) if rows is not None else None
    found = diagnostics.tables()
    if diagnostics.compared:
        found |= describe(moments.correlation(runtime.control), diagnostics.compared)
    return Evaluation(runtime.broadcast(metrics), rows, runtime.total(loader.counts), found)


def _searched(
    model: DistributedModelParallel,
    loader: Loader,
    task: RetrievalTask,
    config: RetrievalMetrics,
    runtime: Runtime,
    groups: Sequence[str],
    note: Callable[[StepOutput], None],
) -> Rows | None:
    """As `collect`, each row with its place in the list of its query."""
    batches, count = task.batches(runtime)
    mine = task.catalogue.share(runtime.rank, runtime.world_size)
    search = Search(task, item_vectors(forward(model, batches, count, runtime), len(mine)), config, runtime)
    store = RowStore(num_labels=0, groups=[*groups, *JUDGED])
    excluded: deque[list[Ragged]] = deque()  # of the batches that are under way
    try:
        queries = _noted(iter(loader), excluded, config)
        for output in forward(model, queries, loader.batches_left or 0, runtime):
            store.append(search.judged(output, excluded.popleft()))
            note(output)
    finally:
        loader.close()
    return store.merged(runtime.control)


def _noted(batches: Iterator[Batch], excluded: deque[list[Ragged]], config: RetrievalMetrics) -> Iterator[Batch]:
    for batch in batches:
        excluded.append(listed(batch, config))
        yield batch
