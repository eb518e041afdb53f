"""What a run leaves behind and shows, read back from real files, pipes and a pseudo-terminal."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import struct
import termios
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_rec.training.report import ReportConfig, Reporter, format_table, to_json

METRICS = {"ne": 0.8125, "log_loss": 0.25, "auc": 0.75, "calibration": 1.0625, "auc/domain=3": 0.625}
PLAIN = ReportConfig(tensorboard=False)


def make_result(**metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "metrics": metrics,
        "examples": 12345,
        "examples_per_second": 1000.4,
        "data_wait_share": 0.015,
        "wall_seconds": 65.2,
        "world_size": 2,
        "versions": {"torch": "2.13.0"},
    }


def report(reporter: Reporter, *steps: int) -> None:
    """Reports as of a run with 10 rows and 0.02 s per step, a fiftieth of it waiting."""
    for step in steps:
        reporter.train(step, step * 10, METRICS, seconds=step * 0.02, wait_seconds=step * 0.0004)


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_jsonl_has_one_object_per_report(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path / "run", total_steps=10, is_main=True, config=PLAIN)
    report(reporter, 5)
    reporter.evaluation(10, 100, "eval", {"ne": float("nan"), "auc": float("inf"), "loss/bce": 0.5})
    train, evaluation = lines_of(tmp_path / "run")
    assert train == {
        "step": 5,
        "examples": 50,
        "split": "train",
        "metrics": METRICS,
        "examples_per_second": 500.0,
        "data_wait_share": 0.02,
    }
    expected = {"ne": None, "auc": None, "loss/bce": 0.5}
    assert evaluation == {"step": 10, "examples": 100, "split": "eval", "metrics": expected}
    assert not (tmp_path / "run" / "tb").exists()


def test_other_ranks_write_and_print_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reporter = Reporter(tmp_path / "run", total_steps=10, is_main=False, config=ReportConfig())
    reporter.resume(3, 0, 0.0, 0.0)
    reporter.advance(4)
    report(reporter, 5)
    reporter.evaluation(10, 100, "eval", METRICS)
    reporter.finish(make_result(eval=METRICS))
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_resume_drops_reports_from_beyond_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter = Reporter(tmp_path, total_steps=10, is_main=True, config=PLAIN)
    report(reporter, 2, 4, 6, 8)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "exam')  # a crash in the middle of a write
    reporter = Reporter(tmp_path, total_steps=10, is_main=True, config=PLAIN)
    with caplog.at_level(logging.WARNING):
        reporter.resume(4, 0, 0.0, 0.0)
    assert "dropped a line" in caplog.text
    report(reporter, 5)
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4, 5]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_fresh_run_drops_the_reports_of_one_that_left_no_checkpoint(tmp_path: Path) -> None:
    report(Reporter(tmp_path, total_steps=10, is_main=True, config=PLAIN), 1, 2)
    report(Reporter(tmp_path, total_steps=10, is_main=True, config=PLAIN), 1, 3)
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 3]


def test_pace_is_that_since_the_last_report(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, total_steps=10, is_main=True, config=PLAIN)
    reporter.train(0, 0, {}, seconds=0.0, wait_seconds=0.0)
    reporter.train(1, 100, {}, seconds=2.0, wait_seconds=0.5)
    reporter.train(2, 400, {}, seconds=4.0, wait_seconds=2.0)
    paces = [(line["examples_per_second"], line["data_wait_share"]) for line in lines_of(tmp_path)]
    assert paces == [(0.0, 0.0), (50.0, 0.25), (150.0, 0.75)]


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reporter = Reporter(tmp_path, total_steps=100, is_main=True, config=PLAIN)
    reporter.advance(3)
    report(reporter, 50)
    reporter.evaluation(50, 500, "eval", METRICS)
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "train  step 50/100  examples 500  500 examples/s  data wait 2.0%  ne 0.81250  auc 0.75000  remaining 0:00:01",
        "eval  step 50/100  ne 0.81250  log_loss 0.25000  auc 0.75000  calibration 1.06250",
    ]
    assert err == ""


def open_terminal(columns: int) -> tuple[int, Any]:
    """The reading end and the stream of a pseudo-terminal."""
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40 if columns else 0, columns, 0, 0))
    return main, open(terminal, "w")


def shown_on(main: int, stream: Any) -> str:
    stream.flush()
    os.set_blocking(main, False)
    shown = b""
    while True:
        try:
            shown += os.read(main, 1 << 16)
        except BlockingIOError:
            stream.close()
            os.close(main)
            return shown.decode()


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    main, stream = open_terminal(columns=160)
    reporter = Reporter(tmp_path, total_steps=100, is_main=True, config=PLAIN, stream=stream)
    reporter.line("the plan")
    reporter.resume(40, 0, 0.0, 0.0)
    reporter.advance(41)
    report(reporter, 50)
    reporter.evaluation(50, 500, "eval", METRICS)
    reporter.finish(make_result(eval=METRICS))
    shown = shown_on(main, stream)
    assert shown.startswith("the plan\r\n")
    assert "40/100" in shown, "the bar must start at the resumed step"
    assert "50/100" in shown
    assert "500 examples/s  data wait 2.0%  ne 0.81250  auc 0.75000" in shown
    assert "train  step" not in shown, "a report of training updates the bar and prints no line"
    assert "eval  step 50/100  ne 0.81250" in shown
    assert shown.splitlines()[-3].startswith("split")


def test_terminal_without_size_gets_lines(tmp_path: Path) -> None:
    main, stream = open_terminal(columns=0)
    report(Reporter(tmp_path, total_steps=100, is_main=True, config=PLAIN, stream=stream), 50)
    assert shown_on(main, stream).startswith("train  step 50/100")


def test_tensorboard_events_and_purge_on_resume(tmp_path: Path) -> None:
    reporter = Reporter(tmp_path, total_steps=10, is_main=True, config=ReportConfig())
    report(reporter, 2, 4, 6)
    reporter.close()
    reporter = Reporter(tmp_path, total_steps=10, is_main=True, config=ReportConfig())
    reporter.resume(4, 0, 0.0, 0.0)
    report(reporter, 5)
    reporter.evaluation(5, 50, "eval", METRICS)
    reporter.close()
    reporter.close()  # an entry closes in `finally` too
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/auc")] == [(2, 0.75), (4, 0.75), (5, 0.75)]
    assert [e.value for e in events.Scalars("train/examples_per_second")] == [500.0] * 3
    assert [(e.step, e.value) for e in events.Scalars("eval/auc/domain=3")] == [(5, 0.625)]


def test_finish_writes_the_result_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    reporter = Reporter(tmp_path, total_steps=10, is_main=True, config=PLAIN)
    reporter.finish(make_result(train={"auc": float("nan")}, eval=METRICS))
    assert json.loads((tmp_path / "result.json").read_text()) == {
        "metrics": {"train": {"auc": None}, "eval": METRICS},
        "examples": 12345,
        "examples_per_second": 1000.4,
        "data_wait_share": 0.015,
        "wall_seconds": 65.2,
        "world_size": 2,
        "versions": {"torch": "2.13.0"},
    }
    assert os.listdir(tmp_path) == ["result.json"]
    assert capsys.readouterr().out == (
        "\n12,345 examples in 0:01:05 on 2 rank(s)  1,000 examples/s  data wait 1.5%\n\n"
        "split               ne  log_loss      auc  calibration\n"
        "train                -         -      nan            -\n"
        "eval           0.81250   0.25000  0.75000      1.06250\n"
        "eval domain=3        -         -  0.62500            -\n"
    )


def test_table_of_several_labels_and_grouped_auc() -> None:
    table = format_table(
        {"eval": {"loss/bce": 1.0, "click/gauc/user": 0.5, "click/ne": 0.9, "buy/ne/domain=-1": 0.7, "buy/ne": 0.8}}
    )
    assert table.splitlines() == [
        "split                    ne  gauc/user  loss/bce",
        "eval                      -          -   1.00000",
        "eval click          0.90000    0.50000         -",
        "eval buy            0.80000          -         -",
        "eval buy domain=-1  0.70000          -         -",
    ]


def test_json_has_null_where_a_number_is_not_finite() -> None:
    text = to_json({"a": [1.5, float("nan")], "b": {"c": float("-inf")}, "d": None})
    assert json.loads(text) == {"a": [1.5, None], "b": {"c": None}, "d": None}


def test_settings() -> None:
    assert list(ReportConfig().check()) == []
    (complaint,) = ReportConfig(every=0).check()
    assert complaint.key == "every" and "is 0" in complaint.text
