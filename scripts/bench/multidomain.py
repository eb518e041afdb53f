"""Multi-domain models beside each other: examples/s and the bytes that a step exchanges.

    torchrun --nproc-per-node 2 -m scripts.bench.multidomain [--arms crocodile_2 crocodile_5 ple] [--layout wide]

Whole training steps on batches in memory, all arms in the same processes in turn, against shared bottom. Crocodile
(with 2 or 5 sets) trains with its covariance loss, on all rows or on 32 of them, and its mean loss per domain.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from dist_rec.config import from_mapping
from dist_rec.job import quiet_libraries
from dist_rec.recommender import distribute
from dist_rec.training.runtime import Runtime, process
from scripts.bench.arms import MEMORY, alternate, exchanged, random_batch, ratio, training

BASE = "shared_bottom"
_EXPERTS = {"experts": [128, 64], "towers": [64]}
_IDS = {"prior": ["c0", "c1", "c2"], "prior_dim": 16}
_PER_DOMAIN = {"name": "bce", "mean_by": "domain"}


def _crocodile(sets: int, **auxiliary: Any) -> dict[str, Any]:
    model = {"name": "crocodile", "num_experts": sets, **_IDS, **_EXPERTS}
    return {"model": model, "objective": _PER_DOMAIN, "auxiliary": auxiliary}


ARMS: dict[str, dict[str, Any]] = {
    BASE: {"model": {"name": "shared_bottom", "bottom": [128, 64], "towers": [64]}},
    "mmoe": {"model": {"name": "mmoe", "num_experts": 2, **_EXPERTS}},
    "ple": {"model": {"name": "ple", "levels": 2, **_EXPERTS}},
    "cgc": {"model": {"name": "ple", "levels": 1, **_EXPERTS}},
    "me_mmoe": {"model": {"name": "me_mmoe", "num_experts": 2, **_EXPERTS}},
    "me_ple": {"model": {"name": "me_ple", **_EXPERTS}},
    "stem": {"model": {"name": "stem", **_EXPERTS}},
    "pepnet": {"model": {"name": "pepnet", "domain_features": ["c2"], "widths": [128, 64], **_IDS}},
    "star": {"model": {"name": "star", "widths": [128, 64]}},
    "crocodile_2": _crocodile(2, covariance={}),
    "crocodile_2_rows32": _crocodile(2, covariance={"rows": 32}),
    "crocodile_2_no_covariance": _crocodile(2),
    "crocodile_5": _crocodile(5, covariance={}),
    "crocodile_5_rows32": _crocodile(5, covariance={"rows": 32}),
    "crocodile_5_no_covariance": _crocodile(5),
}


def main() -> None:
    """Parses the arguments, times the arms and prints a JSON line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["ple", "crocodile_2", "crocodile_5"])
    parser.add_argument("--layout", choices=("separate", "wide"), default="separate")
    parser.add_argument("--features", type=int, default=12)
    parser.add_argument("--rows", type=int, default=100_000, help="rows of each table")
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--domains", type=int, default=5)
    parser.add_argument("--batch", type=int, default=2048, help="rows per rank and step")
    parser.add_argument("--sharding", default="table_wise")
    parser.add_argument("--optimizer", default="adagrad")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=15, help="steps of an arm in a round")
    arguments = parser.parse_args()
    quiet_libraries()
    names = list(dict.fromkeys([BASE, *arguments.arms]))
    with process(from_mapping(_mapping(arguments, BASE)).run) as runtime:
        results = compare(names, runtime, arguments)
        if runtime.is_main:
            for name, result in results.items():
                print(json.dumps({"arm": name, "ranks": runtime.world_size, **result}), flush=True)


def compare(names: list[str], runtime: Runtime, arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Of each arm: examples/s, how many times as fast as shared bottom, bytes that rank 0 sends into collectives."""
    arms, sent = {}, {}
    for name in names:
        config = from_mapping(_mapping(arguments, name))
        batches = [random_batch(config, runtime.rank * MEMORY + i) for i in range(MEMORY)]
        parts = distribute(config, runtime)
        arms[name] = training(parts.model, parts.optimizer.combined, batches, arguments.steps, runtime)
        sent[name] = {kind: round(count / arguments.steps) for kind, count in exchanged(arms[name]).items()}
    seconds = alternate(arms, runtime, arguments.rounds)
    examples = arguments.steps * arguments.batch * runtime.world_size * arguments.rounds
    return {
        name: {
            "examples_per_second": round(examples / sum(taken)),
            **ratio(seconds[BASE], taken),
            "bytes_per_step": sent[name],
        }
        for name, taken in seconds.items()
    }


def _mapping(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    arm = ARMS[name]
    return {
        "schema": {
            "labels": {"label": None},
            "sparse": {f"c{i}": {"num_ids": arguments.rows} for i in range(arguments.features)},
            "groups": {"domain": {"column": "domain", "num_ids": arguments.domains}},
        },
        "data": {"train": "none", "batch_size": arguments.batch},
        "embeddings": {"sharding": arguments.sharding, "layout": arguments.layout},
        "optim": {"tables": {"name": arguments.optimizer}},
        "run": {"device": "cpu"},
        **arm,
        "model": {"dim": arguments.dim, **arm["model"]},
    }


if __name__ == "__main__":
    main()
