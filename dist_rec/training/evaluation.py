"""One pass over a split, with every rank's rows gathered before a metric is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from dist_rec.contract import StepOutput
from dist_rec.data.loader import Loader
from dist_rec.data.schema import Schema
from dist_rec.metrics.compute import MetricsConfig, compute
from dist_rec.metrics.representations import Moments, describe
from dist_rec.metrics.rows import Rows, RowStore
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
        metrics: the same on every rank. rows: what they were computed from, on rank 0, in the order of the loader:
            without shuffle that of the files, on any number of ranks.
        policies: what the schema's policies did to values of the split, over all ranks (see `data.ids.PolicyCounts`).
        diagnostics: the same on every rank; empty if none were asked for.
    """

    metrics: dict[str, float]
    rows: Rows | None
    policies: dict[str, int]
    diagnostics: dict[str, float]


def predict(model: DistributedModelParallel, loader: Loader, runtime: Runtime) -> Iterator[StepOutput]:
    """What each batch of one pass over `loader` leaves, on the device; the loader is closed at the end. Collective.

    The model must not be attached to a pipeline. It is put in eval mode and back. Go through all of them: a rank that
    stops early leaves the others waiting.
    """
    training = model.training
    model.eval()
    # in eval mode TorchRec's training pipeline only overlaps and computes; it asks nothing of an optimiser
    pipeline = TrainPipelineSparseDist(model, None, runtime.device, execute_all_batches=True)
    batches = iter(loader)
    try:
        for _ in range(loader.batches_left or 0):
            with torch.no_grad():  # not around the yield: it would hold in the caller's code too
                output = pipeline.progress(batches)
            yield output
    finally:
        pipeline.detach()
        loader.close()
        model.train(training)


def evaluate(
    model: DistributedModelParallel,
    loader: Loader,
    schema: Schema,
    config: MetricsConfig,
    runtime: Runtime,
    groups: Sequence[str] | None = None,
    diagnostics: Diagnostics = Diagnostics(),
) -> Evaluation:
    """Evaluates one pass over `loader`; see `predict`. Collective.

    Args:
        groups: the groups to keep with the rows; by default those that the metrics need.
        diagnostics: what else to say of the model.
    """
    store = RowStore(num_labels=len(schema.labels), groups=config.groups if groups is None else groups)
    moments = Moments()
    for output in predict(model, loader, runtime):
        store.append(output)
        if output.compared is not None:
            moments.add(output.compared, output.weights)
    rows = store.merged(runtime.control)
    metrics = compute(rows, schema, config) if rows is not None else None
    found = diagnostics.tables()
    if diagnostics.compared:
        found |= describe(moments.correlation(runtime.control), diagnostics.compared)
    return Evaluation(runtime.broadcast(metrics), rows, runtime.total(loader.counts), found)
