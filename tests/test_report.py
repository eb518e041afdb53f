"""`dist-rec report` through its entry: one self-contained page with all sections, its numbers, and what is refused."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from dist_rec import cohorts, evaluate, report, train
from dist_rec.metrics.binary import auc, log_loss, normalized_entropy
from dist_rec.reporting.folders import short_names
from tests.ranks import run_ranks
from tests.runs import values, write

ROWS, TEST_ROWS = 400, 301
SECTIONS = {
    "runs": "Runs",
    "curves": "Training curves",
    "metrics": "Final metrics",
    "cohorts": "Cohorts",
    "divergence": "Cohort divergence",
    "weights": "Weights",
}
ENTRIES = {"train": train, "report": report, "cohorts": cohorts, "evaluate": evaluate}


def _enter(rank: int, world_size: int, calls: list[tuple[str, list[str]]]) -> str:
    """What entries print on this rank, one after the other, or the message that one ends with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for entry, arguments in calls:
            try:
                ENTRIES[entry].main(arguments)
            except SystemExit as end:
                return str(end.code)
    return out.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs base and new (which records weights and has cohorts), and their data."""
    folder = tmp_path_factory.mktemp("report")
    write(folder / "data" / "train", ROWS)
    write(folder / "data" / "test", TEST_ROWS, seed=7)
    weights = {"parameters": ["dense.arch.top.*.weight"], "every": 10}
    special: dict[str, dict[str, Any]] = {
        "base": {"report": {"weights": weights}},
        "new": {"report": {"weights": weights}, "optim": {"dense": {"lr": 0.02}}, "run": {"seed": 5}},
    }
    calls = []
    for name, sections in special.items():
        data = {"test": str(folder / "data" / "test"), "validation": str(folder / "data" / "test")}
        config = values(folder / "data" / "train", folder / name, data=data, train={"eval_every": 10})
        for section, content in sections.items():
            config[section] = {**config.get(section, {}), **content}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
        calls.append(("train", [str(folder / f"{name}.yaml")]))
    calls.append(("cohorts", [str(folder / "base"), str(folder / "data" / "train"), "axes=domain", "min_positives=5"]))
    run_ranks(_enter, 1, calls)
    return folder


def _report(runs: Path, out: Path, *options: str, world_size: int = 1) -> str:
    """The report of base and new: what rank 0 printed."""
    arguments = [str(runs / "base"), str(runs / "new"), f"output={out}", *options]
    printed = run_ranks(_enter, world_size, [("report", arguments)])
    assert printed[1:] == [""] * (world_size - 1)
    return printed[0]


def test_the_page_is_whole_self_contained_and_has_every_section(runs: Path, tmp_path: Path) -> None:
    printed = _report(runs, tmp_path / "r.html", "axes=domain,user:3")
    text = (tmp_path / "r.html").read_text()
    assert str(tmp_path / "r.html") in printed and "NE difference" in printed
    assert text.startswith("<!DOCTYPE html>")
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))  # well-formed, so no browser has to guess
    found = {section.get("id"): section for section in root.iter("section")}
    assert {name: section.findtext("h2") for name, section in found.items()} == SECTIONS
    assert [a.get("href") for a in root.iter("a")] == [f"#{name}" for name in SECTIONS]
    for forbidden in ("http", "src=", "<script", "@import", "url(", "<link", "<iframe"):
        assert forbidden not in text, forbidden
    charts = {name: len(list(section.iter("svg"))) for name, section in found.items()}
    # ne and auc of training and validation, and a loss; 4 of each division; head and tail, matrix; 1 + 2 + 4 of each
    assert charts == {"runs": 0, "curves": 5, "metrics": 0, "cohorts": 12, "divergence": 2, "weights": 7}
    for svg in root.iter("svg"):
        assert svg.findtext("title") and svg.get("role") == "img"
    words = " ".join(root.itertext())
    for needed in ("base (baseline)", "head: domain = ", "tail: domain = ", "neither", "95% interval", "user >= ",
                   "Jensen-Shannon divergence", "dense.arch.top.layers.0.weight"):  # fmt: skip
        assert needed in words, needed


def test_its_numbers_are_those_of_evaluate_and_of_the_definitions(runs: Path, tmp_path: Path) -> None:
    _report(runs, tmp_path / "r.html", "axes=domain")
    said = json.loads((tmp_path / "r.json").read_text())
    calls = []
    for name in ("base", "new"):
        card = str(runs / name / "config.yaml")
        calls.append(("evaluate", [card, f"evaluate.predictions={tmp_path}/{name}.parquet"]))
    run_ranks(_enter, 1, calls)
    tables = [pq.read_table(tmp_path / f"{name}.parquet") for name in ("base", "new")]
    z = [t.column("logit_click").to_numpy() for t in tables]
    y, w, domain = (tables[0].column(name).to_numpy() for name in ("label_click", "weight", "domain"))
    y = y.astype(np.float64)
    assert said["runs"] == ["base", "new"] and said["cohorts"]["all rows"]["rows"] == TEST_ROWS
    masks = {"all rows": domain >= 0, **{f"domain = {d}": domain == d for d in range(3)}}
    for name, mask in masks.items():
        for logits, metrics in zip(z, said["metrics"], strict=True):
            here = logits[mask], y[mask], w[mask]
            expected = normalized_entropy(*here), normalized_entropy(*here, base_rate=float(y.mean())), auc(*here)
            assert [metrics[name][key] for key in ("ne", "ne_global", "auc")] == pytest.approx(expected, rel=1e-9)
        base, new = (log_loss(logits[mask], y[mask], w[mask]) for logits in z)
        (difference,) = said["differences"][name]
        assert difference["value"] == pytest.approx((new - base) / base, rel=1e-6)
        assert difference["low"] < difference["value"] < difference["high"]
        assert said["cohorts"][name]["positives"] == int(y[mask].sum())
    heads = [name for name in said["cohorts"] if name.startswith(("head", "tail", "neither"))]
    assert sum(said["cohorts"][name]["rows"] for name in heads) == TEST_ROWS and len(heads) == 3


def test_any_number_of_ranks_gives_the_same_page(runs: Path, tmp_path: Path) -> None:
    for world_size in (1, 3):
        _report(runs, tmp_path / f"{world_size}.html", "axes=user:4", world_size=world_size)
    one, three = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 3))
    assert one["cohorts"] == three["cohorts"]
    for a, b in zip(_numbers(one), _numbers(three), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-8)
    assert re.sub(r"[\d.]+", "", (tmp_path / "1.html").read_text()) == re.sub(
        r"[\d.]+", "", (tmp_path / "3.html").read_text()
    )


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for name in value for number in _numbers(value[name])]
    if isinstance(value, list):
        return [number for one in value for number in _numbers(one)]
    return [float(value)] if isinstance(value, int | float) and math.isfinite(value) else []


def test_another_baseline_turns_the_difference_round(runs: Path, tmp_path: Path) -> None:
    _report(runs, tmp_path / "a.html")
    _report(runs, tmp_path / "b.html", f"baseline={runs}/new", "unit=user")
    one, other = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert other["runs"] == ["new", "base"] and other["unit"] == "user" and one["unit"] is None
    a, b = one["differences"]["all rows"][0]["value"], other["differences"]["all rows"][0]["value"]
    assert 1 + b == pytest.approx(1 / (1 + a), rel=1e-9)
    # cohorts.json is looked for in the baseline's folder
    assert len(one["cohorts"]) == 4 and len(other["cohorts"]) == 1
    text = (tmp_path / "b.html").read_text()
    assert "values of user" in text and "No cohorts: give cohorts=FILE" in text and "No cohorts.json was given" in text


def test_one_run_alone_has_a_page(runs: Path, tmp_path: Path) -> None:
    arguments = [str(runs / "base"), f"output={tmp_path}/r.html", f"cohorts={runs}/base/cohorts.json", "split=train"]
    (printed,) = run_ranks(_enter, 1, [("report", arguments)])
    assert "written: " in printed
    said = json.loads((tmp_path / "r.json").read_text())
    assert said["cohorts"]["all rows"]["rows"] == ROWS and said["differences"]["all rows"] == []


def test_runs_of_other_data_are_refused_and_data_makes_them_equal(runs: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", 55, seed=9)
    arguments = [str(runs / "base"), str(runs / "moved"), f"output={tmp_path}/r.html"]
    moved = yaml.safe_load((runs / "new" / "config.yaml").read_text())
    moved["data"]["test"] = str(tmp_path / "other")
    (runs / "moved").mkdir(exist_ok=True)
    (runs / "moved" / "config.yaml").write_text(yaml.safe_dump(moved))
    with contextlib.suppress(FileExistsError):
        (runs / "moved" / "checkpoints").symlink_to(runs / "new" / "checkpoints")
    (said,) = run_ranks(_enter, 1, [("report", arguments)])
    assert said.startswith("error: ") and "rows cannot be compared; give the files for all runs with data=PATH" in said
    assert not (tmp_path / "r.html").exists()
    (said,) = run_ranks(_enter, 1, [("report", [*arguments, f"data={tmp_path}/other"])])
    assert "written: " in said


def test_labels_that_are_read_differently_are_refused(runs: Path, tmp_path: Path) -> None:
    changed = yaml.safe_load((runs / "new" / "config.yaml").read_text())
    changed["schema"]["weight"] = {"column": "domain", "on_null": "error", "fill": 1.0}
    (runs / "changed").mkdir(exist_ok=True)
    (runs / "changed" / "config.yaml").write_text(yaml.safe_dump(changed))
    with contextlib.suppress(FileExistsError):
        (runs / "changed" / "checkpoints").symlink_to(runs / "new" / "checkpoints")
    arguments = [str(runs / "base"), str(runs / "changed"), f"output={tmp_path}/r.html"]
    (said,) = run_ranks(_enter, 1, [("report", arguments)])
    assert said.startswith("error: ") and "make schema.labels and schema.weight equal" in said


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["baseline=elsewhere"], ["baseline: is 'elsewhere', which is none of the runs"]),
        (["replicates=0", "seed=-1", "output=r.txt"], ["replicates: is 0", "seed: is -1", "ends with .html"]),
        (["unit=usr"], ["unit: is 'usr', which is no group of the schema; known: domain, row, user"]),
        (["axes=domian", "label=buy"], ["did you mean 'domain'?", "label: is 'buy', which is no binary label of"]),
        (["axes=domain", "max_values=2"], ["axes: 'domain' has more than 2 different values", "or raise max_values"]),
        (["max_values=0"], ["max_values: is 0; use at least 1"]),
        (["axes=row"], ["axes: 'row' has more than 100 different values; cut it into parts with row:10"]),
        (["cohorts=no.json"], ["no.json: cannot be read"]),
        (["split=vali"], ["split: is 'vali'; expected one of train, validation, test"]),
        (["model.dim=0"], ["model.dim"]),
        (["RUNS/../RUNS/new"], ["RUNS/../RUNS/new: is there twice; name each run once"]),
        (["/no/such/run"], ["/no/such/run: has no config.yaml; give the run.dir of a trained run"]),
    ],
)
def test_what_is_wrong_is_said(runs: Path, tmp_path: Path, options: list[str], messages: list[str]) -> None:
    arguments = [str(runs / "base"), str(runs / "new"), f"output={tmp_path}/r.html", *options]
    arguments = [argument.replace("RUNS/../RUNS", f"{runs}/../{runs.name}") for argument in arguments]
    (said,) = run_ranks(_enter, 1, [("report", arguments)])
    said = said.replace(f"{runs}/../{runs.name}", "RUNS/../RUNS")
    assert said.startswith("error: ") and all(message in said for message in messages), said
    assert not list(tmp_path.iterdir())


def test_short_names_differ() -> None:
    assert short_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert short_names(["one/run", "two/run", "two/x"]) == ["one/run", "two/run", "two/x"]
    assert short_names(["a/x/run", "b/x/run"]) == ["a/x/run", "b/x/run"]


def test_intervals_have_a_fixed_seed(runs: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _report(runs, tmp_path / f"{name}.html", f"seed={seed}")
    a, b, c = (np.array(_numbers(json.loads((tmp_path / f"{n}.json").read_text())["differences"])) for n in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
