"""The record of weight distributions: its numbers by hand, when it is made, and what a resume keeps of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_rec.training.weights import WeightRecorder, WeightsConfig, describe
from tests.ranks import run_ranks
from tests.runs import reports, train_all, values, write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), 320)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "weights.jsonl").read_text().splitlines()]


def test_moments_by_hand() -> None:
    found = describe(torch.tensor([[1.0, -1.0], [3.0, 0.0005]]), near_zero=0.001)
    # mean 0.750125
    values = np.array([1.0, -1.0, 3.0, float(torch.tensor(0.0005))])
    centred = values - values.mean()
    assert found["std"] == pytest.approx(values.std(), rel=1e-12)
    assert found["kurtosis"] == pytest.approx((centred**4).mean() / values.var() ** 2, rel=1e-12)
    assert found["near_zero"] == 0.25 and found["shape"] == [2, 2]
    # two values at equal distances: the fourth moment is the square of the second
    assert describe(torch.tensor([0.0, 2.0]), 0.1)["kurtosis"] == pytest.approx(1, rel=1e-15)
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert describe(normal, 0.1)["kurtosis"] == pytest.approx(3, abs=0.05)


def test_effective_rank_by_hand() -> None:
    def rank(matrix: torch.Tensor) -> float:
        return describe(matrix, 0.1)["effective_rank"]

    assert rank(torch.eye(5)) == pytest.approx(5, rel=1e-6)
    assert rank(torch.outer(torch.arange(1.0, 4), torch.ones(7))) == pytest.approx(1, abs=1e-5)
    # singular values 3 and 1: shares 3/4 and 1/4
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rank(torch.tensor([[0.0, 3.0], [-1.0, 0.0]])) == pytest.approx(expected, rel=1e-6)
    assert rank(torch.eye(6).view(6, 2, 3)) == pytest.approx(6, rel=1e-6)
    assert rank(torch.arange(4.0)) is None  # a vector
    assert math.isnan(rank(torch.zeros(2, 2)))


@pytest.mark.parametrize("scale", [1.0, 0.01, 300.0])
def test_a_histogram_counts_every_value_in_its_place(scale: float) -> None:
    values = scale * torch.randn(500, generator=torch.Generator().manual_seed(1)).double()
    found = describe(values, 0.1)["histogram"]
    assert math.log2(found["width"]).is_integer() and sum(found["counts"]) == 500
    assert 32 < float(values.abs().max()) / found["width"] <= 64
    for k, count in enumerate(found["counts"]):
        low = (found["start"] + k) * found["width"]
        assert count == int(((values >= low) & (values < low + found["width"])).sum())


def test_a_histogram_of_extreme_values() -> None:
    assert describe(torch.zeros(3), 0.1)["histogram"] == {"width": 2.0**-20, "start": 0, "counts": [3]}
    assert describe(torch.tensor([1.0, math.inf]), 0.1)["histogram"]["counts"] == []
    assert sum(describe(torch.tensor([64.0, -64.0, 1.0]), 0.1)["histogram"]["counts"]) == 3


def card(data: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    """A run of 20 steps that records two parameters every 8."""
    weights = {"parameters": ["dense.arch.top.*.weight", "*.head.bias"], "every": 8}
    base = values(data, folder, report={"weights": weights, "every": 3}, checkpoint={"every": 10})
    return {**base, **{name: {**base.get(name, {}), **section} for name, section in sections.items()}}


def test_records_are_made_at_the_start_now_and_then_and_at_the_end_and_survive_a_resume(data, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_ranks(train_all, 1, [card(data, whole)])
    run_ranks(train_all, 1, [card(data, stopped, train={"steps": 10})])
    assert [record["step"] for record in records(stopped)] == [0, 8, 10]
    run_ranks(train_all, 1, [card(data, stopped)])
    assert [record["step"] for record in records(whole)] == [0, 8, 16, 20]
    assert [record["step"] for record in records(stopped)] == [0, 8, 10, 16, 20]
    assert [r for r in records(stopped) if r["step"] != 10] == records(whole)
    first, last = records(whole)[0], records(whole)[-1]
    assert (first["examples"], last["examples"]) == (0, 320)
    assert [p["name"] for p in last["parameters"]] == ["dense.arch.top.layers.0.weight", "dense.arch.head.bias"]
    assert first["parameters"][0]["std"] != last["parameters"][0]["std"]
    assert [line["step"] for line in reports(whole, "train")] == [3, 6, 9, 12, 15, 18, 20]


def test_a_run_that_is_complete_records_nothing_twice(data, tmp_path):
    for _ in range(2):
        run_ranks(train_all, 1, [card(data, tmp_path / "run")])
    assert [record["step"] for record in records(tmp_path / "run")] == [0, 8, 16, 20]


def test_recording_changes_nothing(data, tmp_path):
    run_ranks(train_all, 2, [card(data, tmp_path / "with"), values(data, tmp_path / "without", report={"every": 3})])
    with_, without = (reports(tmp_path / name, "train")[-1]["metrics"] for name in ("with", "without"))
    assert with_ == without
    assert (tmp_path / "with" / "weights.jsonl").exists() and not (tmp_path / "without" / "weights.jsonl").exists()


def test_a_pattern_that_matches_nothing_is_named() -> None:
    model = torch.nn.ModuleDict({"top": torch.nn.Linear(2, 2)})
    with pytest.raises(
        ValueError, match=r"report.weights.parameters: has 'botom\*', .* there are top.weight, top.bias"
    ):
        WeightRecorder(model, WeightsConfig(parameters=["top.*", "botom*"]))
