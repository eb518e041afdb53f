"""Which rows are in the head and in the tail, and what a file that says so must not say."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_rec.data.cohorts import Axis, read
from dist_rec.data.schema import GroupColumn, LabelColumn, Schema, SparseColumn
from dist_rec.settings import ConfigError

GOOD: dict[str, Any] = {
    "axes": ["age", "gender"],
    "edges": {"age": [18, 25.5, 35], "gender": None},
    "head": {"age": 3, "gender": 1},
    "tail": {"age": 0, "gender": 0},
    "head_rate": 0.02,
    "tail_rate": 0.01,
    "head_mass": 0.2,
    "tail_mass": 0.05,
    "divergence": [[0, 1], [1, 0]],
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**GOOD, **changes}))
    return path


def test_cells_are_those_of_numpys_searchsorted() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-50, 50, 1000)
    for edges in ([0], [-7, -6.5, 0, 3.25, 40], [-1000, 1000]):
        found = Axis("a", tuple(edges)).cells(torch.from_numpy(values))
        assert found.tolist() == np.searchsorted(edges, values, side="right").tolist()
    assert Axis("a").cells(torch.tensor([4, -1])).tolist() == [4, -1]


def test_cells_of_one_group_among_several_come_without_a_warning() -> None:
    values = torch.arange(6).view(3, 2)[:, 1]
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Axis("a", (3,)).cells(values).tolist() == [0, 1, 1]
    finally:
        torch.set_warn_always(False)


def test_cells_of_large_ids_are_exact() -> None:
    big = 2**53  # in float64 big and big + 1 are the same number
    assert Axis("a", (big + 1,)).cells(torch.tensor([big, big + 1])).tolist() == [0, 1]


def test_a_row_is_in_a_cohort_if_all_its_cells_are(tmp_path: Path) -> None:
    cohorts = read(write(tmp_path / "cohorts.json"))
    groups = {"age": torch.tensor([35, 34, 70, 17, 17, 18]), "gender": torch.tensor([1, 1, 0, 0, 1, 0])}
    head, tail = cohorts.masks({**groups, "user": torch.arange(6)})
    assert head.tolist() == [True, False, False, False, False, False]
    assert tail.tolist() == [False, False, False, True, False, False]


def test_a_file_is_read_without_what_it_says_besides(tmp_path: Path) -> None:
    path = write(tmp_path / "cohorts.json", label="click")
    known = {key: value for key, value in GOOD.items() if key != "divergence"}
    assert asdict(read(path)) == {**known, "label": "click", "columns": None, "path": str(path)}


def test_it_must_fit_the_schema(tmp_path: Path) -> None:
    cohorts = read(write(tmp_path / "cohorts.json", label="buy"))
    groups = {"age": GroupColumn("age"), "gender": GroupColumn("gender")}
    schema = Schema(labels={"click": LabelColumn()}, sparse={"s": SparseColumn(num_ids=2)}, groups=groups)
    (complaint,) = cohorts.check_schema(schema)
    assert complaint.key == "label" and "known: click" in complaint.text
    cohorts.label, cohorts.columns = None, {"age": "floor(years * 10)", "user": "user"}
    groups["age"] = GroupColumn("years", scale=10.0)
    assert list(cohorts.check_schema(schema)) == []
    groups["age"] = GroupColumn("years", scale=1.0)
    (complaint,) = cohorts.check_schema(schema)
    assert complaint.key == "columns"
    assert "'age' was floor(years * 10) when the cohorts were found, now it is floor(years * 1)" in complaint.text
    cohorts.columns = None
    del groups["gender"]
    found = {c.key: c.text for c in cohorts.check_schema(schema)}
    assert "names 'gender'" in found["axes"] and "known: age" in found["axes"]


@pytest.mark.parametrize(
    ("changes", "complaints"),
    [
        ({"axes": []}, {"axes": "is []", "edges": "each of", "head": "each of", "tail": "each of"}),
        ({"axes": ["age", "age", "gender"]}, {"axes": "different names"}),
        ({"axes": "age"}, {"axes": "expected a list"}),
        ({"edges": [1]}, {"edges": "expected a mapping"}),
        ({"edges": {"age": [1]}}, {"edges": "each of age, gender", "head.age": "0 to 1"}),
        ({"edges": {"age": [1, 3, 3], "gender": None}}, {"edges.age": "ascending"}),
        ({"edges": {"age": [1, 2, float("nan")], "gender": None}}, {"edges.age": "ascending"}),
        ({"edges": {"age": ["1"], "gender": None}}, {"edges.age[0]": "expected an integer or a number"}),
        ({"head": {"age": 3}}, {"head": "each of age, gender"}),
        ({"head": {"age": 4, "gender": 1}}, {"head.age": "3 edges make the cells 0 to 3"}),
        ({"tail": {"age": True, "gender": 1}}, {"tail.age": "expected an integer"}),
        ({"tail": GOOD["head"]}, {"tail": "must differ"}),
        ({"head_rate": None}, {"head_rate": "is None"}),
        ({"tail_mass": 1.5}, {"tail_mass": "is 1.5"}),
        ({"tail_mass": float("nan")}, {"tail_mass": "is nan"}),
        ({"head_rate": 0.3}, {"head_rate": "more than head_mass (0.2)"}),
        ({"label": 3}, {"label": "is 3"}),
    ],
)
def test_everything_wrong_is_named(tmp_path: Path, changes: dict[str, Any], complaints: dict[str, str]) -> None:
    path = write(tmp_path / "cohorts.json", **changes)
    with pytest.raises(ConfigError) as caught:
        read(path)
    found = {c.key: c.text for c in caught.value.complaints}
    assert found.keys() == {f"{path}.{key}" for key in complaints}
    for key, words in complaints.items():
        assert words in found[f"{path}.{key}"]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "cohorts.json"
    with pytest.raises(ConfigError, match=r"cannot be read .*dist-rec cohorts"):
        read(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        read(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="is not a JSON object"):
        read(path)
