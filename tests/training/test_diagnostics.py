"""Diagnostics of an evaluation, from the config to the run folder, on any number of ranks; training is as without."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from dist_rec import evaluate, train
from dist_rec.config import RunConfig, from_mapping
from dist_rec.contract import ArchOutput
from dist_rec.data.schema import Schema
from dist_rec.models import dcn
from dist_rec.settings import ConfigError
from tests.ranks import run_ranks
from tests.runs import reports, values, write

ROWS, STEPS = 400, 6


class Halves(nn.Module):
    """A DCN that shows the two halves of its last layer as two experts."""

    def __init__(self, arch: dcn.DCN) -> None:
        super().__init__()
        self.arch, self.half = arch, arch.representation_dims["shared"] // 2
        self.representation_dims = {"shared": 2 * self.half, "expert_0": self.half, "expert_1": self.half}

    def forward(self, dense: Tensor, tables: Mapping[str, Tensor], groups: Mapping[str, Tensor]) -> ArchOutput:
        predictions, found = self.arch(dense, tables, groups)
        first, second = found["shared"].split(self.half, dim=1)
        return ArchOutput(predictions, found | {"expert_0": first, "expert_1": second})


@dataclass
class TwoExperts(dcn.Config):
    def build(self, schema: Schema) -> Any:
        return Halves(super().build(schema))


def settings(run: dict[str, Any]) -> RunConfig:
    config = from_mapping(run)
    config.model = TwoExperts(dim=8, deep=[16])
    return config


def jobs(rank: int, world_size: int, runs: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"train": train, "evaluate": evaluate}[verb].run(settings(run)) for verb, run in runs]


ASKED = {"correlation": ["expert_*"], "information_abundance": True}
KEYS = {
    "correlation", "correlation/expert_0~expert_1", "diversity_qjsd", "information_abundance",
    "information_abundance/main", *(f"information_abundance/main/{t}" for t in ("user", "item", "tags")),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks, with diagnostics ("asked") and without ("plain"), and the first evaluated on 1 to 3 ranks."""
    folder = tmp_path_factory.mktemp("diagnostics")
    write(folder / "data", ROWS)
    run_ranks(jobs, 2, [("train", run(folder, "asked", metrics=ASKED)), ("train", run(folder, "plain"))])
    for world_size in (1, 2, 3):
        more = {"data": {"eval_batch_size": 16 * 6 // world_size}}
        evaluated = run_ranks(jobs, world_size, [("evaluate", run(folder, "asked", metrics=ASKED, **more))])
        (folder / f"on{world_size}.json").write_text(json.dumps(evaluated[0][0]))
    return folder


def run(folder: Path, name: str, **sections: Any) -> dict[str, Any]:
    data = {"test": str(folder / "data"), "validation": str(folder / "data"), **sections.pop("data", {})}
    train = {"steps": STEPS, "eval_every": 4}
    return values(folder / "data", folder / name, data=data, train=train, **sections)


def test_evaluations_report_them_and_training_does_not(folder: Path) -> None:
    lines = reports(folder / "asked")
    assert [(line["split"], line["step"]) for line in lines if "diagnostics" in line] == [
        ("validation", 4), ("validation", 6), ("test", 6)
    ]  # fmt: skip
    result = json.loads((folder / "asked" / "result.json").read_text())
    assert set(result["diagnostics"]) == {"validation", "test"}
    for found in [*result["diagnostics"].values(), *(line["diagnostics"] for line in lines if "diagnostics" in line)]:
        assert set(found) == KEYS
        assert all(math.isfinite(value) for value in found.values())
        assert 0 < found["correlation"] < 1 and 0 < found["diversity_qjsd"] < 1
        assert 1 < found["information_abundance"] < 8
    assert result["diagnostics"]["test"] == lines[-1]["diagnostics"]
    assert not set(result["metrics"]["test"]) & KEYS


def test_asking_changes_nothing_else(folder: Path) -> None:
    asked, plain = (json.loads((folder / name / "result.json").read_text()) for name in ("asked", "plain"))
    assert asked["metrics"] == plain["metrics"]
    assert "diagnostics" not in plain
    assert not [line for line in reports(folder / "plain") if "diagnostics" in line]


def test_any_number_of_ranks_gives_the_same(folder: Path) -> None:
    expected = json.loads((folder / "asked" / "result.json").read_text())["diagnostics"]["test"]
    for world_size in (1, 2, 3):
        found = json.loads((folder / f"on{world_size}.json").read_text())["diagnostics"]
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=f"{name} on {world_size} ranks")


def build_wrong(rank: int, world_size: int, wrong: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        train.run(settings(wrong))
    return str(error.value)


def test_a_name_that_is_none_is_an_error_that_lists_those_that_are(folder: Path) -> None:
    wrong = run(folder, "wrong", metrics={"correlation": ["tower_*"]})
    (text,) = run_ranks(build_wrong, 1, wrong)
    assert "metrics.correlation: has 'tower_*', which matches no representation of the model" in text
    assert "it has shared, expert_0, expert_1" in text
