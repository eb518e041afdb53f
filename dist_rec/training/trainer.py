"""The only training loop: TorchRec's pipelined step, and around it reports, evaluation, checkpoints and the guards."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardedModule

from dist_rec.contract import StepOutput
from dist_rec.data.loader import Loader
from dist_rec.data.schema import Schema
from dist_rec.metrics.compute import MetricsConfig, compute
from dist_rec.metrics.rows import RowStore
from dist_rec.settings import Complaint
from dist_rec.training.checkpoint import Checkpoint, Checkpointer
from dist_rec.training.evaluation import evaluate
from dist_rec.training.optim import NonFiniteGradient, StepOptimizer
from dist_rec.training.report import Reporter
from dist_rec.training.runtime import Runtime

log = logging.getLogger(__name__)


@dataclass
class EarlyStopping:
    """Stop when a validation metric has not improved for a while; the best weights are restored at the end."""

    metric: str = "ne"
    mode: Literal["min", "max"] = "min"
    patience: int = 2  # evaluations without improvement before the run stops
    min_delta: float = 0.0


@dataclass
class TrainConfig:
    """The `train` section. The run ends at `steps` or after `epochs`, whichever comes first."""

    steps: int | None = None
    epochs: int | None = 1
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast of the dense arch; tables and loss stay float32
    eval_every: int | None = None  # steps between evaluations of data.validation; one is always made at the end
    early_stopping: EarlyStopping | None = None

    def check(self, has_validation: bool) -> Iterator[Complaint]:
        """Complaints about a run without an end, and about early stopping that could never act."""
        if self.steps is None and self.epochs is None:
            yield Complaint("steps", "and train.epochs are both empty, so the run would never end; set one of them")
        for key in ("steps", "epochs", "eval_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                yield Complaint(key, f"is {value}; use at least 1, or leave it out")
        if self.early_stopping is not None:
            if not has_validation:
                yield Complaint("early_stopping", "needs a validation set; set data.validation")
            if self.eval_every is None:
                yield Complaint("early_stopping", "acts at evaluations during training; set train.eval_every")
            if self.early_stopping.patience < 1:
                yield Complaint("early_stopping.patience", f"is {self.early_stopping.patience}; use at least 1")


class TrainingStopped(ArithmeticError):
    """The loss or a gradient is not finite; the message says at which step, on which data, and where to go on from."""


class _NonFiniteLoss(ArithmeticError):
    """Raised before backward, on every rank at once."""


class GuardedPipeline(TrainPipelineSparseDist):
    """TorchRec's pipeline, which looks at the loss of all ranks before backward.

    Fused table optimisers write inside backward, and what a NaN has written cannot be taken back.
    """

    def __init__(self, model: DistributedModelParallel, optimizer: StepOptimizer, runtime: Runtime) -> None:
        super().__init__(model, optimizer, runtime.device, execute_all_batches=True)
        self._runtime = runtime

    def _backward(self, losses: Tensor) -> None:
        if not self._runtime.all_true(torch.isfinite(losses.detach())):
            raise _NonFiniteLoss(f"loss {losses.item()}")
        super()._backward(losses)

    def pipelined(self) -> tuple[list[str], list[str]]:
        """(names of the sharded modules whose input exchange overlaps with computation, names of all of them)."""
        sharded = {m: name for name, m in self._model.named_modules() if isinstance(m, ShardedModule)}
        inside = [sharded[m] for m in self._pipelined_modules if m in sharded]
        return inside, list(sharded.values())


@dataclass
class Progress:
    """Where a run stands; all of it is in the checkpoint."""

    step: int = 0
    examples: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0


@dataclass
class Trainer:
    """Trains `model` over `loader` for `total_steps` steps, of which some may lie behind.

    Attributes:
        loader: the training batches, from the position the run resumes at.
        validation: makes a fresh loader over the validation set, or None.
        facts: JSON-able facts that every checkpoint carries (config, plan, versions).
    """

    model: DistributedModelParallel
    optimizer: StepOptimizer
    loader: Loader
    validation: Callable[[], Loader] | None
    schema: Schema
    config: TrainConfig
    metrics: MetricsConfig
    reporter: Reporter
    checkpointer: Checkpointer
    runtime: Runtime
    total_steps: int
    report_every: int
    checkpoint_every: int | None
    facts: dict[str, Any]
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.window = RowStore(
            num_labels=len(self.schema.labels),
            groups=self.metrics.groups,
            window_rows=self.metrics.rank_window(self.runtime.world_size),
        )
        self.pipeline = GuardedPipeline(self.model, self.optimizer, self.runtime)
        self._first_step = self.progress.step
        self._batches: Iterator | None = None
        self._saved_step: int | None = None
        self._evaluated: tuple[int, dict[str, float]] | None = None

    def resume(self, checkpoint: Checkpoint) -> None:
        """Loads everything but the data position, which the loader was made from."""
        parts = self.checkpointer.load(checkpoint, self.model, self.optimizer)
        for part in parts:
            self.window.load_state(part)
        self.progress = Progress(**checkpoint.meta["progress"])
        self._first_step = self._saved_step = self.progress.step

    def fit(self) -> dict[str, float] | None:
        """Runs to the end and returns the validation metrics of the final weights (None without a validation set).

        Raises:
            TrainingStopped: the loss or a gradient became NaN or infinite.
        """
        self.run_to(self.total_steps)
        self.pipeline.detach()
        return self._finish()

    def run_to(self, step: int) -> None:
        """Trains until `step` steps are done, or until early stopping says that it is enough."""
        self.model.train()
        self._batches = self._batches or iter(self.loader)
        started, waited = time.perf_counter(), self.loader.wait_seconds
        while self.progress.step < step and not self._should_stop():
            self._advance(self._batches)
            now, wait = time.perf_counter(), self.loader.wait_seconds
            self.progress.seconds += now - started
            self.progress.wait_seconds += wait - waited
            self._after_step()
            started, waited = time.perf_counter(), self.loader.wait_seconds

    def _advance(self, batches: Iterator) -> None:
        step = self.progress.step
        self.optimizer.set_step(step)
        try:
            output: StepOutput = self.pipeline.progress(batches)
        except (_NonFiniteLoss, NonFiniteGradient) as error:
            raise TrainingStopped(self._explain(error)) from error
        if step == self._first_step:
            self._report_pipelined()
        self.window.append(output)
        self.progress.step += 1
        self.reporter.advance(self.progress.step)

    @property
    def _batches_finished(self) -> int:
        return self.progress.step - self._first_step

    def _after_step(self) -> None:
        step, last = self.progress.step, self.progress.step == self.total_steps
        if step % self.report_every == 0 or last:
            self._report()
        every = self.config.eval_every
        if self.validation is not None and every is not None and step % every == 0:
            self._validate()
        if self.checkpoint_every is not None and step % self.checkpoint_every == 0:
            self._save()

    def window_metrics(self) -> dict[str, float]:
        """Metrics of the newest training rows of all ranks; empty on all ranks but the first. Collective."""
        rows = self.window.merged(self.runtime.control)
        return compute(rows, self.schema, self.metrics) if rows is not None else {}

    def _report(self) -> None:
        p, metrics = self.progress, self.window_metrics()
        p.examples = self.loader.examples(self._batches_finished)
        self.reporter.train(p.step, p.examples, metrics, seconds=p.seconds, wait_seconds=p.wait_seconds)

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        if self._evaluated is not None and self._evaluated[0] == self.progress.step:
            return self._evaluated[1]
        self.pipeline.detach()  # batches in flight stay in the pipeline and are trained on afterwards
        metrics, _ = evaluate(self.model, self.validation(), self.schema, self.metrics, self.runtime)
        self._evaluated = (self.progress.step, metrics)
        self.progress.examples = self.loader.examples(self._batches_finished)
        self.reporter.evaluation(self.progress.step, self.progress.examples, "validation", metrics)
        self._judge(metrics)
        return metrics

    def _judge(self, metrics: dict[str, float]) -> None:
        rule, p = self.config.early_stopping, self.progress
        if rule is None:
            return
        if rule.metric not in metrics:
            raise ValueError(
                f"train.early_stopping.metric is '{rule.metric}', which is not computed; metrics: {', '.join(metrics)}"
            )
        value = metrics[rule.metric]
        gain = -math.inf if math.isnan(value) else math.inf
        if p.best_value is not None and not math.isnan(value):
            gain = p.best_value - value if rule.mode == "min" else value - p.best_value
        if gain > rule.min_delta:
            p.best_value, p.best_step, p.evaluations_since_best = value, p.step, 0
            self._save()
        else:
            p.evaluations_since_best += 1

    def _should_stop(self) -> bool:
        rule = self.config.early_stopping
        return rule is not None and self.progress.evaluations_since_best >= rule.patience

    def _finish(self) -> dict[str, float] | None:
        metrics = self._validate() if self.validation is not None else None
        self._save()
        best = self.progress.best_step
        if self.validation is not None and best is not None and best != self.progress.step:
            log.info("restoring the best weights, of step %d", best)
            self.checkpointer.load(self.checkpointer.at(best), self.model, None)
            metrics, _ = evaluate(self.model, self.validation(), self.schema, self.metrics, self.runtime)
        return metrics

    def _save(self) -> None:
        step = self.progress.step
        if self._saved_step == step:
            return
        cursor = self.loader.cursor(self._batches_finished)
        self.progress.examples = self.loader.examples(self._batches_finished)
        meta = {"cursor": cursor, "progress": vars(self.progress).copy(), **self.facts}
        self.checkpointer.save(
            step, self.model, self.optimizer, meta=meta, own=self.window.state(), best_step=self.progress.best_step
        )
        self._saved_step = step

    def _report_pipelined(self) -> None:
        inside, every = self.pipeline.pipelined()
        outside = sorted(set(every) - set(inside))
        text = f"pipelined: {len(inside)} of {len(every)} sharded modules ({', '.join(inside) or 'none'})"
        self.reporter.line(text + (f"; not pipelined: {', '.join(outside)}" if outside else ""))

    def _explain(self, error: Exception) -> str:
        p, index = self.progress, self._batches_finished
        mine = f"rank {self.runtime.rank}: {error} on {self.loader.where(index)}"
        lines: list[str] = [""] * self.runtime.world_size
        dist.all_gather_object(lines, mine, group=self.runtime.control)
        saved = self.checkpointer.latest()
        last = f"last good checkpoint: {saved.path}" if saved else "no checkpoint was written before it"
        what = "loss" if isinstance(error, _NonFiniteLoss) else "gradient"
        note = "no update was made" if what == "loss" else "tables were updated; go on from the checkpoint"
        return "\n".join(
            [f"the {what} is not finite at step {p.step + 1} ({note}); {last}", *(f"  {line}" for line in lines),
             "  Look for extreme dense values in these rows, or lower optim.*.lr, or set optim.clip_norm."]
        )  # fmt: skip
