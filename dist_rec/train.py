"""Trains one model: `python -m dist_rec.train CONFIG [key=value ...]`, alone, under torchrun, or through TorchX."""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from dist_rec import versions
from dist_rec.config import RunConfig, to_mapping, to_yaml
from dist_rec.data.ids import describe_policies
from dist_rec.embeddings.sharding import describe, sharding_types
from dist_rec.job import JobData, load_config, run_entry
from dist_rec.recommender import distribute
from dist_rec.training.checkpoint import Checkpoint, Checkpointer, CheckpointError, check_reshardable
from dist_rec.training.compatible import check_compatible, check_same_items
from dist_rec.training.evaluation import Evaluation, evaluate
from dist_rec.training.report import Reporter
from dist_rec.training.runtime import Runtime, process
from dist_rec.training.trainer import Trainer
from dist_rec.training.weights import WeightRecorder

log = logging.getLogger(__name__)

USAGE = """usage: dist-rec train CONFIG [key=value ...]

Trains the model of CONFIG (YAML) and leaves everything in run.dir: config.yaml, plan.txt, metrics.jsonl, result.json,
checkpoints/, tb/. A run folder with checkpoints is continued from the newest one; what was trained by other settings
until there has them in config-<step>.yaml. A run that has ended is left as it is.

Overrides that every config understands:
  run.dir=runs/mine run.seed=1 run.device=cpu   where to, which random numbers, on what
  data.train=PATH data.validation=PATH data.test=PATH   a file, a folder, a glob, or a URI such as s3://bucket/folder
  data.batch_size=4096                          rows per rank and step
  train.steps=1000 train.epochs=2               the end, whichever comes first
  checkpoint.every=500 train.eval_every=500     in steps

On several ranks of one machine:  torchrun --nproc-per-node 2 -m dist_rec.train CONFIG [key=value ...]
On a cluster:                     torchx run -s slurm launch/components.py:train --config CONFIG --ranks 8 --gpu 8 \\
                                      -- [key=value ...]
"""


def run(config: RunConfig) -> dict[str, Any]:
    """Trains by `config` in this process, one rank of the job; returns what result.json holds."""
    with process(config.run) as runtime:
        return _Training(config, runtime).run()


class _Training:
    """The parts of one training job, built in the order in which a failure is cheapest."""

    def __init__(self, config: RunConfig, runtime: Runtime) -> None:
        self.config, self.runtime = config, runtime
        self.folder = Path(config.run.dir)
        self.started = time.perf_counter()
        self.checkpointer = Checkpointer(self.folder / "checkpoints", config.checkpoint, runtime)
        self.checkpointer.check_shared()
        self._lock = self._locked()
        self.checkpoint = self.checkpointer.latest()
        if self.checkpoint is not None and config.checkpoint.resume == "never":
            raise CheckpointError(
                f"{self.folder} has checkpoints up to step {self.checkpoint.step} and checkpoint.resume is never; "
                "choose another run.dir, or set checkpoint.resume=auto to go on from there"
            )
        self.data = JobData(config, runtime)
        saved, cursor = None, None
        self.renewed: list[str] = []
        if self.checkpoint is not None:
            self.renewed = check_compatible(self.checkpoint.meta["config"], to_mapping(config))
            check_same_items(self.checkpoint.meta.get("items"), self.data.items())
            saved, cursor = self.checkpoint.meta["plan"], self.checkpoint.meta["cursor"]
        self.parts = distribute(config, runtime, saved)
        if saved is not None:
            check_reshardable(saved, sharding_types(self.parts.plan), config.optim.tables.name)
        self.loader = self.data.train(cursor, self.checkpoint.step if self.checkpoint is not None else 0)

    def _locked(self) -> TextIO | None:
        """Rank 0 holds a lock on the run folder, which ends with the process; a second run in it is refused.

        Where the file system has no locks the run goes on without one.
        """
        lock, problem = None, None
        if self.runtime.is_main:
            lock = open(self.checkpointer.folder / ".lock", "a+")  # noqa: SIM115 - held until the process ends
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # somebody has it
                problem = f"{self.folder} is in use by another run; wait for its end, or choose another run.dir"
            except OSError as error:  # Lustre without -o flock, NFS without lockd, some FUSE mounts
                log.warning("%s: no lock here (%s); two runs in this folder would not be noticed", self.folder, error)
        problem = self.runtime.broadcast(problem)
        if problem is not None:
            raise CheckpointError(problem)
        return lock

    def run(self) -> dict[str, Any]:
        total_steps = self._total_steps()
        is_main = self.runtime.is_main
        reporter = Reporter(self.folder, total_steps=total_steps, is_main=is_main, config=self.config.report)
        try:
            trainer = self._trainer(reporter, total_steps)
            if self.checkpoint is not None:
                trainer.resume(self.checkpoint, self.renewed)
            if trainer.is_finished:  # the folder keeps describing what was trained, whatever the config is now
                reporter.line(self._why_finished(trainer.progress.step, total_steps))
                result = self.runtime.broadcast(self._kept_result() if is_main else None)
                if result is not None:
                    return result
            elif is_main:  # not before: a resume that is refused must leave the folder as it describes its checkpoints
                self._write_folder(reporter)
            if self.checkpoint is not None:
                self._say_continuing(self.checkpoint, trainer, reporter)
            validation = trainer.fit()
            return self._finish(trainer, validation, reporter)
        finally:
            self.loader.close()
            reporter.close()
            if self._lock is not None:
                self._lock.close()

    def _total_steps(self) -> int:
        done = self.checkpoint.step if self.checkpoint is not None else 0
        limits = [self.config.train.steps] if self.config.train.steps is not None else []
        if self.loader.batches_left is not None:
            limits.append(done + self.loader.batches_left)
        return min(limits)

    def _settings_changed(self) -> bool:
        """Whether the config is another one than that which the checkpoint was trained by."""
        now = json.loads(json.dumps(to_mapping(self.config)))  # as a checkpoint holds it
        return self.checkpoint is not None and self.checkpoint.meta["config"] != now

    def _why_finished(self, step: int, total_steps: int) -> str:
        end, key = f"train.steps and train.epochs end at step {total_steps}", "train.steps or train.epochs"
        if step < total_steps:
            end, key = f"early stopping ended the run at step {step}", "train.early_stopping.patience"
        text = f"nothing to train: {end}; raise {key} to go on, or choose another run.dir to start anew"
        changed = "the settings are not those that the run was trained by, and were not applied: "
        return f"{text}\n{changed}config.yaml stays as it is" if self._settings_changed() else text

    def _kept_result(self) -> dict[str, Any] | None:
        """What result.json says of the newest checkpoint; None if the run was stopped before that was written."""
        file = self.folder / "result.json"
        result = json.loads(file.read_text()) if file.exists() else None
        return result if self.checkpoint and result and result["step"] == self.checkpoint.step else None

    def _say_continuing(self, checkpoint: Checkpoint, trainer: Trainer, reporter: Reporter) -> None:
        p = trainer.progress
        reporter.resume(p.step, p.examples, p.seconds, p.wait_seconds)
        reporter.line(
            f"continuing after step {checkpoint.step} from {checkpoint.path}, "
            f"written by {checkpoint.meta['world_size']} rank(s)"
        )
        for name in self.renewed:
            reporter.line(f"auxiliary {name}: {'starts anew' if name in self.config.auxiliary else 'dropped'}")

    def _write_folder(self, reporter: Reporter) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint is not None and self._settings_changed():
            earlier = yaml.safe_dump(self.checkpoint.meta["config"], sort_keys=False)
            (self.folder / f"config-{self.checkpoint.step}.yaml").write_text(earlier)
        (self.folder / "config.yaml").write_text(to_yaml(self.config))
        plan = describe(self.parts.plan, self.parts.tables)
        (self.folder / "plan.txt").write_text(plan + "\n")
        reporter.line(plan)
        reporter.line(self.loader.describe())
        if self.config.checkpoint.every is None and self.config.train.early_stopping is None:
            reporter.line(
                "no checkpoint before the end: a run that is stopped is lost; set checkpoint.every to a number"
            )

    def _trainer(self, reporter: Reporter, total_steps: int) -> Trainer:
        config = self.config
        rule = config.train.early_stopping
        facts = {
            "plan": sharding_types(self.parts.plan),
            "config": to_mapping(config),
            "items": self.data.items(),
            "judged_by": [rule.metric if rule is not None else None, config.data.validation],
            "versions": versions.installed(),
        }
        return Trainer(
            model=self.parts.model,
            optimizer=self.parts.optimizer,
            loader=self.loader,
            validation=self._evaluation("validation"),
            schema=config.schema,
            config=config.train,
            metrics=config.metrics,
            reporter=reporter,
            weights=WeightRecorder(self.parts.model, config.report.weights),
            checkpointer=self.checkpointer,
            runtime=self.runtime,
            total_steps=total_steps,
            report_every=config.report.every,
            checkpoint_every=config.checkpoint.every,
            started=self.started,
            facts=facts,
        )

    def _evaluation(self, split: str) -> Callable[[], Evaluation] | None:
        """Evaluates the model as it then is on a split; None if the config has none."""
        loader, config, parts = self.data.split(split), self.config, self.parts
        if loader is None:
            return None
        task = self.data.task(split)
        return lambda: evaluate(
            parts.model, loader(), config.schema, config.metrics, self.runtime,
            diagnostics=parts.diagnostics, task=task,
        )  # fmt: skip

    def _finish(self, trainer: Trainer, validation: Evaluation | None, reporter: Reporter) -> dict[str, Any]:
        metrics, policies = {"train": trainer.window_metrics()}, {"train": trainer.policies()}
        found = {"validation": validation} if validation is not None else {}
        test = self._evaluation("test")
        if test is not None:
            found["test"] = tested = test()
            p = trainer.progress
            reporter.evaluation(p.step, p.examples, "test", tested.metrics, tested.diagnostics)
        for split, result in found.items():
            metrics[split], policies[split] = result.metrics, result.policies
        for split, counts in policies.items():
            if counts:
                reporter.line(f"{split}: {describe_policies(counts)}")
        p = trainer.measured()
        summary = {
            "metrics": metrics,
            "step": p.step,
            "best_step": p.best_step,
            "examples": p.examples,
            "examples_per_second": p.examples / p.seconds if p.seconds else 0.0,
            "data_wait_share": p.wait_seconds / p.seconds if p.seconds else 0.0,
            "train_seconds": p.seconds,
            "wall_seconds": p.wall_seconds,
            "world_size": self.runtime.world_size,
            "device": self.runtime.device.type,
            "data_policies": policies,
            "versions": versions.installed(),
        }
        if any(result.diagnostics for result in found.values()):
            summary["diagnostics"] = {split: result.diagnostics for split, result in found.items()}
        reporter.finish(summary)
        return summary


def _main(arguments: Sequence[str]) -> None:
    run(load_config(arguments))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry of `python -m dist_rec.train` and `dist-rec train`."""
    interrupted = "interrupted; the same command goes on from the newest checkpoint in run.dir, if one was written"
    run_entry(_main, arguments, USAGE, interrupted)


if __name__ == "__main__":
    main()
