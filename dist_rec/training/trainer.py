"""The only training loop: TorchRec's pipelined step, and around it reports, evaluation, checkpoints and the guards."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from dist_rec.metrics.compute import MetricsConfig, compute, direction
from dist_rec.metrics.rows import RowStore
from dist_rec.settings import Complaint
from dist_rec.training.checkpoint import Checkpoint, Checkpointer
from dist_rec.training.evaluation import Evaluation
from dist_rec.training.optim import NonFiniteGradient, StepOptimizer
from dist_rec.training.report import Reporter
from dist_rec.training.runtime import Runtime
from dist_rec.training.weights import WeightRecorder

log = logging.getLogger(__name__)


@dataclass
class EarlyStopping:
    """Stop when a validation metric has not improved for a while; the best weights are restored at the end."""

    metric: str = "ne"  # any of a report's metrics of all rows; higher AUC is better, lower of anything else
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

    def check(self, has_validation: bool, metric_names: list[str] | None) -> Iterator[Complaint]:
        """Complaints about a run without an end, and about early stopping that could never act.

        metric_names: what an evaluation reports; None if that cannot be known.
        """
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
            usable = [name for name in metric_names or () if direction(name)]
            if metric_names is not None and self.early_stopping.metric not in usable:
                text = f"is '{self.early_stopping.metric}'; choose one of {', '.join(usable)}"
                yield Complaint("early_stopping.metric", text)
            if self.early_stopping.patience < 1:
                yield Complaint("early_stopping.patience", f"is {self.early_stopping.patience}; use at least 1")


class TrainingStopped(ArithmeticError):
    """The loss or a gradient is not finite; the message says at which step, on which data, and where to go on from."""


class _NonFiniteLoss(ArithmeticError):
    """Raised before backward, on every rank at once."""


class LossMeans:
    """Mean of every loss term over the steps since the last report; sums stay on the device until then."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        """One step's terms, scalars of this rank."""
        for name, value in losses.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.double()
        self._steps += 1

    def take(self, runtime: Runtime) -> dict[str, float]:
        """ "loss/<term>" -> its mean over ranks and steps, and begins anew. Collective."""
        names = sorted(self._sums)
        values = torch.tensor([*(float(self._sums[n]) for n in names), self._steps], dtype=torch.float64)
        self._sums, self._steps = {}, 0
        dist.all_reduce(values, group=runtime.control)
        return {f"loss/{name}": float(value / values[-1]) for name, value in zip(names, values[:-1], strict=True)}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "steps": self._steps}

    def load_state(self, state: dict[str, Any]) -> None:
        """Adds what an earlier process had summed, on the host until the next report."""
        for name, value in state["sums"].items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += state["steps"]


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
    seconds: float = 0.0  # spent in training steps, by rank 0
    wait_seconds: float = 0.0  # of these, waiting for data: of the rank that waited longest, see `_share_times`
    wall_seconds: float = 0.0  # of all processes of the run, with evaluations, checkpoints and start-up
    policies: dict[str, int] = field(default_factory=dict)  # what column policies did to training values, all ranks
    best_value: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0


@dataclass
class Trainer:
    """Trains `model` over `loader` for `total_steps` steps, of which some may lie behind.

    Attributes:
        loader: the training batches, from the position the run resumes at.
        validation: evaluates the model on the validation set, detached from the pipeline; None without one.
        started: `time.perf_counter()` when this process began its work.
        facts: JSON-able facts that every checkpoint carries (config, plan, versions).
    """

    model: DistributedModelParallel
    optimizer: StepOptimizer
    loader: Loader
    validation: Callable[[], Evaluation] | None
    schema: Schema
    config: TrainConfig
    metrics: MetricsConfig
    reporter: Reporter
    weights: WeightRecorder
    checkpointer: Checkpointer
    runtime: Runtime
    total_steps: int
    report_every: int
    checkpoint_every: int | None
    started: float
    facts: dict[str, Any]
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.window = RowStore(
            num_labels=len(self.schema.labels),
            groups=self.metrics.groups,
            window_rows=self.metrics.rank_window(self.runtime.world_size),
        )
        self.pipeline = GuardedPipeline(self.model, self.optimizer, self.runtime)
        self._losses = LossMeans()
        self._before = replace(self.progress)  # as this process found it
        self._timed = (0.0, 0.0)  # seconds, wait_seconds that all ranks agree on
        self._batches: Iterator | None = None
        self._saved_step: int | None = None
        self._evaluated: tuple[int, Evaluation] | None = None

    def resume(self, checkpoint: Checkpoint, fresh: Sequence[str] = ()) -> None:
        """Loads everything but the data position, which the loader was made from, and the auxiliaries `fresh`."""
        for part in self.checkpointer.load(checkpoint, self.model, self.optimizer, fresh):
            self.window.load_state(part["window"])
            self._losses.load_state(part["losses"])
        self.progress = Progress(**checkpoint.meta["progress"])
        self._before = replace(self.progress)
        self._timed = (self.progress.seconds, self.progress.wait_seconds)
        if self.config.early_stopping is None or checkpoint.meta["judged_by"] != self.facts["judged_by"]:
            # a best value by another metric or on other data cannot be compared with those to come
            self.progress.best_value = self.progress.best_step = None
            self.progress.evaluations_since_best = 0
        self._saved_step = self.progress.step

    def fit(self) -> Evaluation | None:
        """Runs to the end and returns the evaluation of the final weights (None without a validation set).

        Raises:
            TrainingStopped: the loss or a gradient became NaN or infinite.
        """
        self.run_to(self.total_steps)
        self.pipeline.detach()
        return self._finish()

    def run_to(self, step: int) -> None:
        """Trains until `step` steps are done, or until early stopping says that it is enough."""
        self.model.train()
        if self.progress.step == 0:
            self._record_weights()
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
        if step == self._before.step:
            self._report_pipelined()
        self.window.append(output)
        self._losses.add(output.losses)
        self.progress.step += 1
        self.reporter.advance(self.progress.step)

    @property
    def _batches_finished(self) -> int:
        return self.progress.step - self._before.step

    def _after_step(self) -> None:
        step, last = self.progress.step, self.progress.step == self.total_steps
        if step % self.report_every == 0 or last:
            self._report()
        self._record_weights()
        every, improved = self.config.eval_every, False
        if self.validation is not None and (last or (every is not None and step % every == 0)):
            improved = self._judge(self._validate())
        if improved or last or (self.checkpoint_every is not None and step % self.checkpoint_every == 0):
            self._save()

    @property
    def is_finished(self) -> bool:
        """Whether no step is left to train: all are done, or early stopping has ended the run."""
        return self.progress.step >= self.total_steps or self._should_stop()

    def window_metrics(self) -> dict[str, float]:
        """Metrics of the newest training rows of all ranks; empty on all ranks but the first. Collective."""
        rows = self.window.merged(self.runtime.control)
        return compute(rows, self.schema, self.metrics) if rows is not None else {}

    def _share_times(self) -> None:
        """Makes the times since the last call the same on all ranks: whom one rank's disk keeps waiting, waits in a
        collective, and would say that it never waited for data. Collective.
        """
        p = self.progress
        spent = self.runtime.gather((p.seconds - self._timed[0], p.wait_seconds - self._timed[1]))
        seconds = spent[0][0]
        p.seconds = self._timed[0] + seconds
        p.wait_seconds = self._timed[1] + min(max(wait for _, wait in spent), seconds)  # clocks start a little apart
        self._timed = (p.seconds, p.wait_seconds)

    def _report(self) -> None:
        self._share_times()
        p, metrics = self.measured(), self.window_metrics()
        metrics |= self._losses.take(self.runtime)
        self.reporter.train(p.step, p.examples, metrics, seconds=p.seconds, wait_seconds=p.wait_seconds)

    def _record_weights(self, *, last: bool = False) -> None:
        step = self.progress.step
        if self.runtime.is_main and self.weights.due(step, last):
            self.reporter.weights(step, self.measured().examples, self.weights.measure(step))

    def _validate(self) -> Evaluation:
        assert self.validation is not None
        if self._evaluated is not None and self._evaluated[0] == self.progress.step:
            return self._evaluated[1]
        self.pipeline.detach()  # batches in flight stay in the pipeline and are trained on afterwards
        result = self.validation()
        self._evaluated = (self.progress.step, result)
        p = self.measured()
        self.reporter.evaluation(p.step, p.examples, "validation", result.metrics, result.diagnostics)
        return result

    def _judge(self, result: Evaluation) -> bool:
        """Whether this is the best evaluation so far by the rule of early stopping."""
        rule, p = self.config.early_stopping, self.progress
        if rule is None:
            return False
        value = result.metrics[rule.metric]
        gain = -math.inf if math.isnan(value) else math.inf
        if p.best_value is not None and not math.isnan(value):
            gain = direction(rule.metric) * (value - p.best_value)
        if gain > rule.min_delta:
            p.best_value, p.best_step, p.evaluations_since_best = value, p.step, 0
            return True
        p.evaluations_since_best += 1
        return False

    def _should_stop(self) -> bool:
        rule = self.config.early_stopping
        return rule is not None and self.progress.evaluations_since_best >= rule.patience

    def _finish(self) -> Evaluation | None:
        self._record_weights(last=True)
        result = self._validate() if self.validation is not None else None
        self._save()
        best = self.progress.best_step
        if self.validation is not None and best is not None and best != self.progress.step:
            log.info("restoring the best weights, of step %d", best)
            self.checkpointer.load(self.checkpointer.at(best), self.model, None)
            result = self.validation()
        return result

    def measured(self) -> Progress:
        """Progress with everything that is cheap to know only now and then brought up to date. Not collective."""
        self.progress.examples = self.loader.examples(self._batches_finished)
        self.progress.wall_seconds = self._before.wall_seconds + time.perf_counter() - self.started
        return self.progress

    def policies(self) -> dict[str, int]:
        """What column policies did to the training values read so far, over all ranks. Collective.

        Counted when a block of rows is read: a resume in the middle of a block counts what it reads again.
        """
        here = self.runtime.total(self.loader.counts)
        return {key: self._before.policies.get(key, 0) + here.get(key, 0) for key in {*self._before.policies, *here}}

    def _save(self) -> None:
        step = self.progress.step
        if self._saved_step == step:
            return
        self._share_times()
        self.progress.policies = self.policies()
        cursor, progress = self.loader.cursor(self._batches_finished), self.measured()
        meta = {"cursor": cursor, "progress": vars(progress).copy(), **self.facts}
        own = {"window": self.window.state(), "losses": self._losses.state()}
        self.checkpointer.save(step, self.model, self.optimizer, meta=meta, own=own, best_step=progress.best_step)
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
