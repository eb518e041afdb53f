"""Diagnostics of an evaluation, from the config to the run folder, on any number of ranks; training is as without."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_rec import evaluate, train
from dist_rec.config import from_mapping
from dist_rec.settings import ConfigError
from tests.ranks import run_ranks
from tests.runs import DOMAINS, reports, values, write

ROWS, STEPS = 400, 6


def jobs(rank: int, world_size: int, runs: list[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"train": train, "evaluate": evaluate}[verb].run(from_mapping(run)) for verb, run in runs]


MODEL = {"name": "crocodile", "prior": ["user"], "dim": 8, "prior_dim": 4, "experts": [16, 8], "towers": [8]}
SETS = {"expert_0": ("user", "item", "tags"), "expert_1": ("user", "item", "tags"), "prior": ("user",)}
ASKED = {"correlation": ["expert_*"], "information_abundance": True}
KEYS = {
    "correlation", "correlation/expert_0~expert_1", "diversity_qjsd", "information_abundance",
    *(f"information_abundance/{s}" for s in SETS), *(f"information_abundance/{s}/{f}" for s in SETS for f in SETS[s]),
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
    groups = {"domain": {"num_ids": DOMAINS}}
    whole = values(folder / "data", folder / name, data=data, train=train, schema={"groups": groups}, **sections)
    return whole | {"model": MODEL}


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
        train.run(from_mapping(wrong))
    return str(error.value)


def test_a_name_that_is_none_is_an_error_that_lists_those_that_are(folder: Path) -> None:
    wrong = run(folder, "wrong", metrics={"correlation": ["tower_*"]})
    (text,) = run_ranks(build_wrong, 1, wrong)
    assert "metrics.correlation: has 'tower_*', which matches no representation of the model" in text
    assert "it has expert_0, expert_1, shared" in text
