"""`dist-rec cohorts` through its entry: planted cohorts are found, ranks do not matter, what is wrong is said."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from dist_rec import cohorts, train
from dist_rec.data.cohorts import read
from tests.ranks import run_ranks
from tests.runs import merged, values, write

ROWS = 400
LOW = ["min_positives=5"]


def _enter(rank: int, world_size: int, arguments: list[str]) -> str:
    """What the entry prints on this rank, or the message it ends with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            cohorts.main(arguments)
        except SystemExit as end:
            return str(end.code)
    return out.getvalue()


def _train(rank: int, world_size: int, cards: list[str]) -> None:
    for card in cards:
        train.main([card])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), ROWS)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; the schema has groups row, domain, user and price, which is d0 times 100."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    groups = {"price": {"column": "d0", "scale": 100}}
    optim = {"tables": {"lr": 0.1}, "dense": {"name": "adamw", "lr": 0.01}}
    card = folder.with_suffix(".yaml")
    card.write_text(yaml.safe_dump(values(data, folder, schema={"groups": groups}, train={"epochs": 4}, optim=optim)))
    run_ranks(_train, 1, [str(card)])
    return folder


@pytest.mark.parametrize(
    "options",
    [
        ["axes=domain"],
        ["axes=domain,price:10,user:5%", "pairs=true", "divergence=kl"],
        ["axes=price:-100/0/50", "bins=40", "low=-2", "high=2", "divergence=wasserstein"],
    ],
)
def test_any_number_of_ranks_writes_the_same_file(
    trained: Path, data: Path, tmp_path: Path, options: list[str]
) -> None:
    files = []
    for world_size in (1, 3):
        out = tmp_path / f"{world_size}.json"
        printed = run_ranks(_enter, world_size, [str(trained), str(data), *options, *LOW, f"output={out}"])
        assert "<- head" in printed[0] and str(out) in printed[0]
        assert printed[1:] == [""] * (world_size - 1)
        files.append([out.read_text(), out.with_suffix(".svg").read_text()])
    assert files[0] == files[1]


def test_the_file_is_one_that_auxiliaries_read_and_says_where_it_is_from(trained: Path, data: Path) -> None:
    (printed,) = run_ranks(_enter, 1, [str(trained), str(data), "axes=price:4", "divergence=wasserstein", *LOW])
    found, said = read(trained / "cohorts.json"), json.loads((trained / "cohorts.json").read_text())
    assert found.axes == ["price"] and found.label == "click"
    assert found.columns is not None and found.columns["price"] == "floor(d0 * 100)"
    price = np.floor(pq.read_table(data).column("d0").to_numpy().astype(np.float64) * 100)
    edges = np.sort(price)[[100, 200, 300]].astype(int).tolist()
    assert said["edges"] == {"price": edges}
    click = pq.read_table(data).column("click").to_numpy()
    cell = np.searchsorted(edges, price, side="right")
    for part in ("head", "tail"):
        here = cell == said[part]["price"]
        assert said[f"{part}_mass"] == here.mean() and said[f"{part}_rate"] == (here * click).mean()
    assert said["rows"] == ROWS == said["data"]["rows"] and said["data"]["path"] == str(data)
    assert said["run"]["step"] == 100 and len(said["run"]["config_sha256"]) == 64
    assert sum(said["histograms"]["all"]) == ROWS
    # the label rises with d0, and the model has learnt that
    assert said["head"] == {"price": 3} and said["tail"] == {"price": 0}
    assert f"price >= {edges[-1]}" in printed and "wasserstein" in printed
    root = ElementTree.fromstring((trained / "cohorts.svg").read_text())
    words = " ".join(root.itertext())
    for needed in ("predicted log-odds", f"head: price >= {edges[-1]}", "Wasserstein-1 distance"):
        assert needed in words


def test_without_axes_all_groups_of_few_values_are_tried(trained: Path, data: Path, tmp_path: Path) -> None:
    (printed,) = run_ranks(_enter, 1, [str(trained), str(data), *LOW, f"output={tmp_path}/c.json"])
    assert "left out: 'user' has more than 100 different values; cut it into parts with user:10" in printed
    assert json.loads((tmp_path / "c.json").read_text())["axes"] == ["domain"]


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["axes=domian"], ["axes: names 'domian', which is no group of the run's schema; did you mean 'domain'?"]),
        (["axes=domain", "bins=1", "min_mas=3"], ["min_mas: is not a known key; did you mean 'min_mass'?"]),
        (["axes=domain,x:1", "bins=1", "min_mass=2"], ["axes: has 'x:1'", "bins: is 1", "min_mass: is 2.0"]),
        (["axes=domain", "low=-.inf"], ["low: is -inf and high is 10.0; bins need two finite ends"]),
        (["axes=user"], ["axes: 'user' has more than 100 different values; cut it into parts with user:10"]),
        (["axes=domain", "label=buy"], ["label: is 'buy', which is no binary label; known: click"]),
        (
            ["axes=domain"],
            ["min_mass: is 0.01 (4 of 400 rows) and min_positives is 1,000, which no two cohorts", "domain = 0: 1"],
        ),
        # nothing would differ, and the two largest cohorts were the head and the tail
        (
            ["axes=domain", *LOW, "low=50", "high=60"],
            ["low: is 50.0 and high is 60.0", "the one bin at 50.05 or beyond"],
        ),
        (["axes=domain", "model.dim=0"], ["model.dim"]),
    ],
)
def test_what_is_wrong_is_said_once(
    trained: Path, data: Path, tmp_path: Path, options: list[str], messages: list[str]
) -> None:
    out = tmp_path / "c.json"
    said = run_ranks(_enter, 2, [str(trained), str(data), *options, f"output={out}"])
    assert said[0].startswith("error: ") and all(message in said[0] for message in messages), said[0]
    assert said[1] == "1" and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "DATA: is missing: dist-rec cohorts RUN DATA"),
        (
            ["axes=domain", "DATA"],
            "axes=domain: has no config.yaml; give the run.dir of a trained run, and then the data",
        ),
        (["RUN", "axes=domain"], "axes=domain: there is no such file or folder"),
        (["RUN", "DATA", "output=c.txt"], "output: is 'c.txt'; name a file that ends with .json"),
        (
            ["RUN", "DATA", "output=/dev/null/c.json"],
            "output: is '/dev/null', but '/dev/null' is a file; name a folder",
        ),
        (["/tmp", "DATA"], "/tmp: has no config.yaml; give the run.dir of a trained run"),
        (["RUN", "/no/such/data"], "/no/such/data: there is no such file or folder"),
    ],
)
def test_arguments_that_are_no_run_and_no_data(trained: Path, arguments: list[str], message: str) -> None:
    (said,) = run_ranks(_enter, 1, [str(trained) if a == "RUN" else a for a in arguments])
    assert said.startswith("error: ") and message in said


# Planted cohorts

SEGMENTS, UP, DOWN = 20, 4, 13


def _planted(folder: Path, seed: int, rows: int = 12_000) -> Path:
    """Two minorities, 4 % each, in which x has opposite effects; in the majority it has none."""
    rng = np.random.default_rng(seed)
    share = [0.04 if s in (UP, DOWN) else 0.92 / (SEGMENTS - 2) for s in range(SEGMENTS)]
    segment, hour = rng.choice(SEGMENTS, rows, p=share), rng.integers(0, 24, rows)
    x, d, item = rng.exponential(1, rows), rng.normal(0, 1, rows), rng.integers(0, 30, rows)
    effect = np.select([segment == UP, segment == DOWN], [1.5, -1.5])
    logit = -0.5 + effect * x + d + 0.3 * np.sin(item)
    columns = {
        "click": (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.float32),
        "x": x.astype(np.float32),
        "d": d.astype(np.float32),
        "segment": segment,
        "item": item,
        "hour": hour,
    }
    folder.mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "a.parquet")
    return folder


def _planted_card(data: Path, folder: Path, seed: int) -> dict[str, Any]:
    schema = {
        "labels": {"click": None},
        "dense": {"x": None, "d": None},
        "sparse": {"segment": {"num_ids": SEGMENTS}, "item": {"num_ids": 30}},
        "groups": {"segment": {"column": "segment"}, "hour": {"column": "hour"}},
    }
    optim = {"tables": {"name": "adagrad", "lr": 0.1}, "dense": {"name": "adamw", "lr": 0.01}}
    more = {"data": {"batch_size": 128}, "run": {"seed": seed}, "optim": optim, "train": {"epochs": 2}}
    return {**merged(values(data, folder), more), "schema": schema}


def test_planted_minorities_are_found(tmp_path: Path) -> None:
    """In the middle of their axis, which too is found, among two. Over more seeds: tests/methods/test_recovery.py."""
    cards, seeds = [], range(2)
    for seed in seeds:
        card = tmp_path / f"{seed}.yaml"
        data = _planted(tmp_path / f"data{seed}", seed)
        card.write_text(yaml.safe_dump(_planted_card(data, tmp_path / f"run{seed}", seed)))
        cards.append(str(card))
    run_ranks(_train, 1, cards)
    for seed in seeds:
        arguments = [str(tmp_path / f"run{seed}"), str(tmp_path / f"data{seed}"), "min_positives=20"]
        run_ranks(_enter, 1, arguments)
        found = read(tmp_path / f"run{seed}" / "cohorts.json")
        assert found.axes == ["segment"], seed
        assert (found.head, found.tail) == ({"segment": UP}, {"segment": DOWN}), seed
