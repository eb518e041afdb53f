"""C2AL on a log with planted cohorts: the heads lower the cohorts' NE, and heads of random cohorts do not as much.

The users' cohort is no feature: the model can learn it only from clicks. Paired over seeds; the criterion is a
one-sided t test at 2.5 %, over 6 seeds: mean > 2.571 standard errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_rec.config import read
from dist_rec.data.synthetic import SyntheticConfig, write
from dist_rec.data.synthetic_cohorts import PlantedCohorts
from tests.ranks import run_ranks
from tests.runs import merged, train_all

ROOT = Path(__file__).parents[2]
SEEDS, QUANTILE = 6, 2.571
COHORTS = {
    "axes": ["planted"],
    "edges": {"planted": None},
    "head": {"planted": 2},
    "tail": {"planted": 0},
    "head_rate": 0.018,
    "tail_rate": 0.009,
    "head_mass": 0.05,
    "tail_mass": 0.05,
}
HEADS: dict[str, Any] = {"cohorts": COHORTS, "lambda_head": 0.3, "lambda_tail": 0.3}
ARMS = {"plain": {}, "c2al": {"c2al": HEADS}, "random": {"c2al": {**HEADS, "random": {"group": "user"}}}}


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    """Arm -> the test metrics of each seed."""
    folder = tmp_path_factory.mktemp("planted")
    planted = SyntheticConfig(
        path=str(folder / "data"),
        rows=100_000,
        eval_rows=50_000,
        users=1000,
        items=200,
        categories=20,
        cohorts=PlantedCohorts(),
    )
    write(planted)
    card = read(str(ROOT / "configs/schemas/synthetic_cohorts.yaml"))
    base = merged(
        {"schema": card["schema"]},
        {
            "data": {"train": f"{planted.path}/train", "test": f"{planted.path}/test", "batch_size": 512},
            "model": {"name": "dcn", "dim": 16, "deep": [64, 32]},
            "optim": {"tables": {"lr": 0.3}, "dense": {"lr": 0.01}},
            "metrics": {"by": ["planted"]},
            "report": {"every": 10**6, "tensorboard": False},
        },
    )
    names = [(arm, seed) for arm in ARMS for seed in range(SEEDS)]
    runs = [
        merged(
            base,
            {
                "auxiliary": ARMS[arm],
                "run": {"seed": seed, "device": "cpu", "dir": str(folder / f"{arm}{seed}")},
            },
        )
        for arm, seed in names
    ]
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for (arm, _), result in zip(names, run_ranks(train_all, 1, runs)[0], strict=True):
        found[arm].append(result["metrics"]["test"])
    return found


def _of_cohorts(metrics: list[dict[str, float]]) -> np.ndarray:
    """(seeds,) NE of head and tail, their mean."""
    return np.array([(m["ne/planted=0"] + m["ne/planted=2"]) / 2 for m in metrics])


def _is_lower(a: np.ndarray, b: np.ndarray) -> bool:
    gain = b - a
    print(f"gain {gain.mean():.4f} ± {gain.std(ddof=1) / len(gain) ** 0.5:.4f} (s.e.)")
    return bool(gain.mean() > QUANTILE * gain.std(ddof=1) / len(gain) ** 0.5)


def test_the_heads_lower_the_ne_of_the_planted_cohorts(metrics: dict[str, list[dict[str, float]]]) -> None:
    assert _is_lower(_of_cohorts(metrics["c2al"]), _of_cohorts(metrics["plain"]))


def test_heads_of_random_cohorts_do_less(metrics: dict[str, list[dict[str, float]]]) -> None:
    assert _is_lower(_of_cohorts(metrics["c2al"]), _of_cohorts(metrics["random"]))
