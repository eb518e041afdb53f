"""Runs of the multi-domain archs that several tests use: three domains, of which ranks miss some, and padding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dist_rec.config import RunConfig
from dist_rec.data.batch import Batch
from dist_rec.data.schema import Schema
from tests.examples import config, global_batch
from tests.parity import Training, sharded

PRIOR = ["user", "item", "hour"]
ARCHS: dict[str, dict[str, Any]] = {
    "crocodile": {"prior": PRIOR, "num_experts": 3, "prior_dim": 4, "experts": [16, 8], "towers": [12]},
    "shared_bottom": {"bottom": [16, 8], "towers": [12]},
    "mmoe": {"num_experts": 3, "experts": [16, 8], "towers": [12]},
    "me_mmoe": {"num_experts": 2, "experts": [16, 8], "towers": []},
    "ple": {"levels": 2, "experts": [16, 8], "towers": [12]},
    "me_ple": {"experts": [16, 8], "towers": [12]},
    "stem": {"experts": [16, 8], "towers": [12]},
    "pepnet": {"domain_features": ["hour"], "prior": ["user", "item"], "prior_dim": 4, "widths": [16, 8]},
    "star": {"widths": [16, 8], "auxiliary": [5]},
}
ROWS, STEPS = 24, 4


def settings(arch: str = "crocodile", *, alpha: float | None = None, rows: int | None = None, **more: Any) -> RunConfig:
    """A run of an arch on three domains, with the per-domain loss, and the covariance loss where there is an alpha."""
    sections: dict[str, Any] = {
        "schema": {"groups": {"domain": {"column": "domain", "num_ids": 3}}},
        "model": {"name": arch, "dim": 8, **ARCHS[arch]},
        "objective": {"name": "bce", "mean_by": "domain"},
        "optim": {"tables": {"name": "adagrad", "lr": 0.1}, "dense": {"name": "sgd", "lr": 0.1}},
    }
    if alpha is not None:
        sections["auxiliary"] = {"covariance": {"alpha": alpha, "rows": rows}}
    return config(**{**sections, **more})


def one_domain_per_rank(batch: Batch) -> Batch:
    """The batch with its rows' domains in order, so that ranks miss domains, and padding at the end.

    A padding row has no ids; here it has some, and they must not matter.
    """
    domain = batch.groups["domain"].sort().values
    domain[-3:] = -1
    weights = batch.weights.clone()
    weights[-3:] = 0
    return replace(batch, groups={"domain": domain}, weights=weights)


def global_rows(schema: Schema, step: int) -> Batch:
    """The rows of all ranks."""
    return one_domain_per_rank(global_batch(schema, step, ROWS))


def some_steps(rank: int, world_size: int, runs_of: list[RunConfig]) -> list[Training]:
    """Each run's first steps as the framework trains it; for `run_ranks`."""
    return sharded(rank, world_size, runs_of, STEPS, batch=global_rows)
