"""One pass over a split, with every rank's rows gathered before a metric is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torchrec.distributed.model_parallel import DistributedModelParallel

from dist_rec.data.loader import Loader
from dist_rec.data.schema import Schema
from dist_rec.metrics.compute import MetricsConfig, compute
from dist_rec.metrics.rows import Rows, RowStore
from dist_rec.training.runtime import Runtime


@dataclass
class EvaluateConfig:
    """The `evaluate` section: what `dist-rec evaluate` does with a finished or running training's checkpoints."""

    split: Literal["train", "validation", "test"] = "test"
    step: int | None = None  # which checkpoint; default: the best one if early stopping noted one, else the newest
    predictions: str | None = None  # write the rows (logits, labels, weight, groups) to this Parquet file


def evaluate(
    model: DistributedModelParallel,
    loader: Loader,
    schema: Schema,
    config: MetricsConfig,
    runtime: Runtime,
    groups: Sequence[str] | None = None,
) -> tuple[dict[str, float], Rows | None]:
    """Metrics of one pass over `loader`, which is closed, the same on every rank; on rank 0 the rows behind them too.

    The model must not be attached to a pipeline. It is put in eval mode and back.

    Args:
        groups: the groups to keep with the rows; by default those that the metrics need.
    """
    store = RowStore(num_labels=len(schema.labels), groups=config.groups if groups is None else groups)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in loader:
                _, output = model(batch.to(runtime.device, non_blocking=True))
                store.append(output)
    finally:
        loader.close()
        model.train(training)
    rows = store.merged(runtime.control)
    metrics = compute(rows, schema, config) if rows is not None else None
    return runtime.broadcast(metrics), rows
