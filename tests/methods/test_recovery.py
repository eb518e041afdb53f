"""C2AL on a log with planted cohorts: discovery finds just these; the heads lower their NE, and random heads do not.

The users' cohort is no feature: the model can learn it only from clicks. Paired over seeds; the criterion is a
one-sided t test at 2.5 %, over 6 seeds: mean > 2.571 standard errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from dist_rec import cohorts
from dist_rec.config import read
from dist_rec.data.cohorts import Cohorts
from dist_rec.data.cohorts import read as read_cohorts
from dist_rec.data.synthetic import SyntheticConfig, write
from dist_rec.data.synthetic_cohorts import PlantedCohorts
from tests.ranks import run_ranks
from tests.runs import train_all

ROOT = Path(__file__).parents[2]
SEEDS, QUANTILE = 6, 2.571
COHORTS = {
    "axes": ["segment"],
    "edges": {"segment": None},
    "head": {"segment": 19},
    "tail": {"segment": 0},
    "head_rate": 0.025,
    "tail_rate": 0.006,
    "head_mass": 0.05,
    "tail_mass": 0.05,
}
HEADS: dict[str, Any] = {"cohorts": COHORTS, "lambda_head": 0.3, "lambda_tail": 0.3}
ARMS = {"plain": {}, "c2al": {"c2al": HEADS}, "random": {"c2al": {**HEADS, "random": {"group": "user"}}}}


class Log(NamedTuple):
    """The planted log, and arm -> the run folder and the test metrics of each seed."""

    data: Path
    folders: dict[str, list[Path]]
    metrics: dict[str, list[dict[str, float]]]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """All arms, trained with every seed."""
    folder = tmp_path_factory.mktemp("planted")
    ids = {"users": 1000, "items": 200, "categories": 20}
    write(SyntheticConfig(path=str(folder / "data"), rows=100_000, eval_rows=50_000, **ids, cohorts=PlantedCohorts()))
    base = {
        "schema": read(str(ROOT / "configs/schemas/synthetic_cohorts.yaml"))["schema"],
        "data": {"train": str(folder / "data/train"), "test": str(folder / "data/test"), "batch_size": 512},
        "model": {"name": "dcn", "dim": 16, "deep": [64, 32]},
        "optim": {"tables": {"lr": 0.3}, "dense": {"lr": 0.01}},
        "metrics": {"by": ["planted"]},
        "report": {"every": 10**6, "tensorboard": False},
    }
    folders = {arm: [folder / f"{arm}{seed}" for seed in range(SEEDS)] for arm in ARMS}
    runs = [
        base | {"auxiliary": ARMS[arm], "run": {"seed": seed, "device": "cpu", "dir": str(folders[arm][seed])}}
        for arm in ARMS
        for seed in range(SEEDS)
    ]
    found = iter(run_ranks(train_all, 1, runs)[0])
    return Log(folder / "data", folders, {arm: [next(found)["metrics"]["test"] for _ in range(SEEDS)] for arm in ARMS})


def _discovered(rank: int, world_size: int, folders: list[Path], data: Path) -> list[Cohorts]:
    for folder in folders:
        cohorts.run(
            *cohorts.load(
                str(folder), str(data / "train"), ["axes=segment,region", "min_mass=0.03", "min_positives=300"]
            )
        )
    return [read_cohorts(folder / "cohorts.json") for folder in folders]


def test_discovery_picks_exactly_the_planted_cohorts(log: Log) -> None:
    """20 segments, of which the ends are planted, and 8 regions, of which none is; with every seed."""
    for found in run_ranks(_discovered, 1, log.folders["plain"], log.data)[0]:
        assert (found.axes, found.head, found.tail) == (["segment"], {"segment": 19}, {"segment": 0})


def _of_cohorts(metrics: list[dict[str, float]]) -> np.ndarray:
    """(seeds,) NE of head and tail, their mean."""
    return np.array([(m["ne/planted=0"] + m["ne/planted=2"]) / 2 for m in metrics])


def _is_lower(a: np.ndarray, b: np.ndarray) -> bool:
    gain = b - a
    print(f"gain {gain.mean():.4f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.4f} (s.e.)")
    return bool(gain.mean() > QUANTILE * gain.std(ddof=1) / len(gain) ** 0.5)


def test_the_heads_lower_the_ne_of_the_planted_cohorts(log: Log) -> None:
    assert _is_lower(_of_cohorts(log.metrics["c2al"]), _of_cohorts(log.metrics["plain"]))


def test_heads_of_random_cohorts_do_less(log: Log) -> None:
    assert _is_lower(_of_cohorts(log.metrics["c2al"]), _of_cohorts(log.metrics["random"]))
