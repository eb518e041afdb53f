"""What a run tells its user: a progress bar or plain lines, TensorBoard, its .jsonl files, result.json, a table."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from dist_rec.settings import Complaint, gather
from dist_rec.training.weights import WeightsConfig

_log = logging.getLogger(__name__)

Metrics = Mapping[str, float]

_MEASURES = ("ne", "log_loss", "auc", "calibration", "mse", "gauc")  # the table's columns in their order
_REPORTS, _WEIGHTS = "metrics.jsonl", "weights.jsonl"
_HEADLINES = ("ne", "mse", "auc")  # what fits on a progress bar; without any of these, the loss terms
_INTERVAL = "/ci"  # ends the name of a half-width of a confidence interval


@dataclass
class ReportConfig:
    """What `report:` takes."""

    every: int = 100  # steps between two reports of training
    tensorboard: bool = True  # write the same numbers for TensorBoard, under tb/ of the run
    weights: WeightsConfig = field(default_factory=WeightsConfig)

    def check(self) -> Iterator[Complaint]:
        """Complaints about the settings, with keys relative to `report`."""
        if self.every < 1:
            yield Complaint("every", f"is {self.every}; a report comes every so many steps, at least 1")
        yield from gather("weights", self.weights.check())


class Reporter:
    """Shows and records what is reported to it; on ranks other than the main one every call does nothing.

    On a terminal there is one progress bar, elsewhere a line per report. `metrics.jsonl` has a JSON object per report,
    appended as a whole line: "step", "examples", "split", "metrics", for the split "train" "examples_per_second" and
    "data_wait_share", and for an evaluation with diagnostics "diagnostics". Where `report.weights` names parameters,
    `weights.jsonl` has an object per record: "step", "examples", "parameters". Numbers that are not finite are null in
    all files.

    Example::

        reporter = Reporter(run_dir, total_steps=1000, is_main=rank == 0, config=ReportConfig())
        # only if training resumes: without it, older reports are dropped
        reporter.resume(50, 204_800, seconds=0.4, wait_seconds=0.01)
        reporter.train(100, 409_600, metrics, seconds=0.8, wait_seconds=0.01)
        reporter.evaluation(1000, 4_096_000, "validation", metrics)
        reporter.finish(result)
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        is_main: bool,
        config: ReportConfig,
        stream: TextIO | None = None,
    ) -> None:
        """A reporter that writes below `run_dir`, which is made if it is missing.

        Args:
            total_steps: the step at which training will end, for the remaining time.
            is_main: whether this is the one rank that writes.
            stream: where text goes; stdout if not given.
        """
        self._dir, self._total, self._main = Path(run_dir), total_steps, is_main
        self._stream = stream if stream is not None else sys.stdout
        self._live = is_main and _has_width(self._stream)
        self._step = 0
        self._kept_until: int | None = None  # the step up to which an earlier attempt's reports stay; -1: none
        self._reported: set[str] = set()  # splits whose evaluation at that step is recorded, and _WEIGHTS if they are
        self._last = (0, 0.0, 0.0)  # examples, seconds, wait_seconds at the last report of training
        self._bar: tqdm | None = None
        self._writer: Any = None
        self._make_writer: Any = None
        if is_main:
            self._dir.mkdir(parents=True, exist_ok=True)
            if config.tensorboard:
                # Here and not at the first report: a missing package must not end a run that has already trained.
                from torch.utils.tensorboard import SummaryWriter

                self._make_writer = SummaryWriter

    def resume(self, step: int, examples: int, seconds: float, wait_seconds: float) -> None:
        """Keeps the reports of an earlier attempt up to `step`, from which training resumes, and drops later ones.

        Each file is replaced in one go; a last line that a crash cut short is dropped too. An evaluation that was
        reported at `step` already is not reported again. The other arguments are as in `train`, at `step`.
        """
        self._step = self._kept_until = step
        self._last = (examples, seconds, wait_seconds)
        if not self._main:
            return
        places = [(report["step"], report["split"]) for report in map(json.loads, self._keep(_REPORTS, step))]
        places += [(record["step"], _WEIGHTS) for record in map(json.loads, self._keep(_WEIGHTS, step))]
        self._reported = {what for at, what in places if at == step and what != "train"}

    def _keep(self, name: str, step: int) -> list[str]:
        """The lines of a file up to `step`, which then are all that it has."""
        path = self._dir / name
        if not path.exists():
            return []
        with path.open(encoding="utf-8") as lines:
            kept = [line for line in lines if _step_of(line, path) <= step]
        _replace(path, "".join(kept))
        return kept

    def line(self, text: str) -> None:
        """Prints `text`, above the progress bar if there is one."""
        if not self._main:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`; records nothing, and costs microseconds."""
        if self._live:
            self._progress().update(step - self._step)
        self._step = step

    def train(self, step: int, examples: int, metrics: Metrics, *, seconds: float, wait_seconds: float) -> None:
        """Reports training; the pace shown and recorded is that since the last report.

        Args:
            step: steps done.
            examples: rows trained on since step 0 by all ranks together.
            metrics: of the newest rows; names as `metrics.compute` gives them.
            seconds: spent training since step 0.
            wait_seconds: of these, waiting for data, by the rank that waited longest.
        """
        if not self._main:
            return
        now = (examples, seconds, wait_seconds)
        rows, duration, wait = (new - old for new, old in zip(now, self._last, strict=True))
        self._last = now
        pace = {
            "examples_per_second": rows / duration if duration else 0.0,
            "data_wait_share": wait / duration if duration else 0.0,
        }
        self._record({"step": step, "examples": examples, "split": "train", "metrics": metrics, **pace})
        self._to_tensorboard("train", step, {**metrics, **pace})
        headline = {k: v for k, v in metrics.items() if k.split("/")[-1] in _HEADLINES}
        headline = headline or {k: v for k, v in metrics.items() if k.startswith("loss/")}
        summary = f"{_pace(pace)}  {_words(headline)}"
        self.advance(step)
        if self._live:
            self._progress().set_postfix_str(summary)
        else:
            left = str(timedelta(seconds=round((self._total - step) * seconds / step))) if step else "unknown"
            self.line(f"train  step {step}/{self._total}  examples {examples:,}  {summary}  remaining {left}")

    def evaluation(
        self, step: int, examples: int, split: str, metrics: Metrics, diagnostics: Metrics | None = None
    ) -> None:
        """Reports an evaluation of `split` after `step` steps of training on `examples` rows.

        Of the diagnostics, only those of the model as a whole (without "/") are printed.
        """
        if not self._main:
            return
        if step == self._kept_until and split in self._reported:
            return
        more = {"diagnostics": diagnostics} if diagnostics else {}
        self._record({"step": step, "examples": examples, "split": split, "metrics": metrics, **more})
        self._to_tensorboard(split, step, {**metrics, **(diagnostics or {})})
        overall = {k: v for k, v in metrics.items() if not _place(k)[2] and not k.endswith(_INTERVAL)}
        overall |= {k: v for k, v in (diagnostics or {}).items() if "/" not in k}
        self.line(f"{split}  step {step}/{self._total}  {_words(overall)}")

    def weights(self, step: int, examples: int, parameters: Sequence[Mapping[str, Any]]) -> None:
        """Records what `WeightRecorder.measure` found after `step` steps of training on `examples` rows."""
        if self._main and not (step == self._kept_until and _WEIGHTS in self._reported):
            self._record({"step": step, "examples": examples, "parameters": parameters}, _WEIGHTS)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Writes `result.json`, prints the last table and closes.

        Args:
            result: at least "metrics" (split -> metric -> value), "examples", "examples_per_second",
                "data_wait_share", "wall_seconds" and "world_size"; all of it is written.
        """
        if not self._main:
            return
        _replace(self._dir / "result.json", to_json(result, indent=2) + "\n")
        self.close()
        wall, ranks = timedelta(seconds=round(result["wall_seconds"])), result["world_size"]
        self.line(f"\n{result['examples']:,} examples in {wall} on {ranks} rank(s)  {_pace(result)}\n")
        self.line(format_table(result["metrics"]))

    def close(self) -> None:
        """Ends the progress bar and flushes TensorBoard's events; harmless to repeat."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _progress(self) -> tqdm:
        if self._bar is None:
            self._bar = tqdm(
                total=self._total, initial=self._step, unit="step", file=self._stream, dynamic_ncols=True, leave=True
            )
        return self._bar

    def _record(self, report: Mapping[str, Any], name: str = _REPORTS) -> None:
        if self._kept_until is None:
            self._kept_until = -1
            for left in (_REPORTS, _WEIGHTS):  # by a run that started here before and wrote no checkpoint
                (self._dir / left).unlink(missing_ok=True)
        with (self._dir / name).open("a", encoding="utf-8") as file:
            file.write(to_json(report) + "\n")

    def _to_tensorboard(self, split: str, step: int, metrics: Metrics) -> None:
        if self._make_writer is None:
            return
        if self._writer is None:
            # Events of an earlier attempt from beyond the resumed step would be drawn as a second line.
            assert self._kept_until is not None, "every report is recorded before it is drawn"
            self._writer = self._make_writer(str(self._dir / "tb"), purge_step=self._kept_until + 1)
        for name, value in metrics.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)


def to_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON text of `value`, with null for every number that JSON cannot write (nan and the infinities)."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def format_table(splits: Mapping[str, Metrics]) -> str:
    """An aligned table: a row per split (and label), then a row per split and group value; a column per metric."""
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for split, metrics in splits.items():
        for key, value in metrics.items():
            label, column, group = _place(key)
            rows.setdefault((split, label, group), {})[column] = value
    names = {c: None for row in rows.values() for c in row if not c.endswith(_INTERVAL)}
    columns = sorted(names, key=_column_rank)
    overall_first = sorted(rows, key=lambda place: bool(place[2]))
    lines = [["split", *columns]]
    for place in overall_first:
        cells = [_cell(rows[place], c) for c in columns]
        lines.append([" ".join(part for part in place if part), *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _cell(row: Mapping[str, float], column: str) -> str:
    if column not in row:
        return "-"
    half = row.get(column + _INTERVAL)
    return f"{row[column]:.5f}" + (f" ±{half:.5f}" if half is not None else "")


def _place(key: str) -> tuple[str, str, str]:
    """(label, metric, group value) of a metric's name: "click/gauc/user/domain=3" has all three."""
    parts = key.split("/")
    group = parts.pop() if len(parts) > 1 and "=" in parts[-1] else ""
    start = next((i for i, part in enumerate(parts) if part in _MEASURES), 0)
    return "/".join(parts[:start]), "/".join(parts[start:]), group


def _column_rank(column: str) -> int:
    measure = column.split("/")[0]
    return _MEASURES.index(measure) if measure in _MEASURES else len(_MEASURES)


def _words(metrics: Metrics) -> str:
    return "  ".join(f"{name} {value:.5f}" for name, value in metrics.items())


def _pace(result: Mapping[str, Any]) -> str:
    return f"{result['examples_per_second']:,.0f} examples/s  data wait {result['data_wait_share']:.1%}"


def _has_width(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can show a bar; under some container tools one has no size at all."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


def _finite(value: Any) -> Any:
    """`value` with every number that JSON cannot write replaced by None."""
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str, path: Path) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        _log.warning("%s: dropped a line that is no report: %.80r", path, line)
        return math.inf


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
