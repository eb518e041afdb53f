"""C2AL in training: off is absent, sharded is unsharded, resumed is whole, and what is served knows nothing of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dist_rec import cli, evaluate
from dist_rec.config import from_mapping
from dist_rec.contract import AUXILIARIES
from dist_rec.recommender import build, distribute
from dist_rec.serving.tensor_file import read
from dist_rec.training.checkpoint import CheckpointError, find
from dist_rec.training.stored import StoredModel
from tests import examples
from tests.examples import COHORTS
from tests.parity import sharded, unsharded, update_errors
from tests.ranks import run_ranks
from tests.runs import merged, reports, train_all, values, write
from tests.sharded import runtime


def settings(**changes: Any) -> dict[str, Any]:
    """`auxiliary.c2al` on the cohorts of the examples."""
    return {"cohorts": COHORTS, "lambda_head": 0.5, "lambda_tail": 0.25, **changes}


_MLP = {"bottom": [16], "top": [16]}
_CROCODILE = {"name": "crocodile", "prior": ["user", "hour"], "dim": 8, "prior_dim": 4, "experts": [16], "towers": [16]}
MODELS: dict[str, dict[str, Any]] = {
    "dlrm": {"model": {"name": "dlrm", "dim": 8, **_MLP}},
    "dcn": {"model": {"name": "dcn", "dim": 8, "deep": [16]}},
    "dhen": {"model": {"name": "dhen", "dim": 8, **_MLP}},
    "mlet": {"model": {"name": "dhen", "dim": 8, **_MLP}, "embeddings": {"inner_dim": 16}},
    "crocodile": {"model": _CROCODILE, "objective": {"name": "bce", "mean_by": "domain"}},
}


def _example(name: str, **sections: Any) -> dict[str, Any]:
    """A small model with heads; the learning rates make a wrong factor show."""
    auxiliary = {"c2al": settings(hidden=[5])} | ({"covariance": None} if name == "crocodile" else {})
    return examples.mapping(
        schema={"groups": {"domain": {"column": "domain", "num_ids": 3}}},
        optim={"tables": {"name": "sgd", "lr": 1.0}, "dense": {"name": "sgd", "lr": 0.1}},
        auxiliary=auxiliary,
        **MODELS[name],
        **sections,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_updates_on_any_number_of_ranks_equal_plain_torch(world_size: int) -> None:
    configs = [from_mapping(_example(name)) for name in MODELS]
    for name, config, found in zip(MODELS, configs, run_ranks(sharded, world_size, configs)[0], strict=True):
        errors = update_errors(found, unsharded(config))
        assert sum(parameter.startswith(AUXILIARIES) for parameter in errors) == 8
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] < 1e-4, (
            f"{name} on {world_size} ranks: the update of {worst} is off by {errors[worst]:.1e}"
        )


def test_a_model_without_heads_has_the_same_other_parameters() -> None:
    for name in MODELS:
        config = from_mapping(_example(name))
        whole, plain = (build(c)[0] for c in (config, replace(config, auxiliary={})))
        with_heads, without = whole.state_dict(), plain.state_dict()
        assert {n: v.shape for n, v in without.items()} == {
            n: v.shape for n, v in with_heads.items() if not n.startswith(AUXILIARIES)
        }
        # built from the same random numbers
        dense = {n: v for n, v in without.items() if n.startswith("dense.")}
        assert dense and all(torch.equal(with_heads[n], v) for n, v in dense.items())


def _clipped(rank: int, world_size: int, run: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Updates of the dense parameters by gradients of 1, of 100 in heads, clipped."""
    parts = distribute(from_mapping(run), runtime(rank, world_size))
    dense = {n: p for n, p in parts.model.named_parameters() if ".embedding_bags." not in n}
    for name, p in dense.items():
        p.grad = torch.full_like(p, 100.0 if name.startswith(AUXILIARIES) else 1.0)
    before = {n: p.detach().clone() for n, p in dense.items()}
    parts.optimizer.step()
    return {n: before[n] - p.detach() for n, p in dense.items()}


def test_heads_are_clipped_apart_and_do_not_slow_down_what_is_served() -> None:
    run = _example("dcn")
    run["optim"]["clip_norm"] = 0.3
    ((whole,), (plain,)) = (run_ranks(_clipped, 1, {**run, **a}) for a in ({}, {"auxiliary": {}}))
    assert all(torch.equal(whole[n], update) for n, update in plain.items())
    for prefix in (AUXILIARIES, "dense.arch"):
        norm = torch.cat([u.flatten() for n, u in whole.items() if n.startswith(prefix)]).norm()
        assert norm.item() == pytest.approx(0.1 * 0.3, rel=1e-4)  # learning rate times the maximum


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 rows."""
    return write(tmp_path_factory.mktemp("data"), 300)


def _run(data: Path, folder: Path, /, **sections: Any) -> dict[str, Any]:
    base = {
        "model": {"dropout": 0.2},
        "optim": {"dense": {"name": "adamw", "lr": 0.01}, "clip_norm": 1.0},
        "train": {"steps": 12, "epochs": 9},
        "report": {"every": 1},
    }
    return values(data, folder, **merged(base, sections))


def _weights(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in find(folder / "checkpoints")[-1].path.glob("*.distcp")}


def _losses(folder: Path, name: str) -> list[float]:
    return [r["metrics"][f"loss/{name}"] for r in reports(folder, "train")]


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_weight_the_run_is_the_plain_one_bit_for_bit(data: Path, tmp_path: Path, world_size: int) -> None:
    off = {"c2al": settings(lambda_head=0.0, lambda_tail=0.0, hidden=[7])}
    auxiliary = {"plain": {}, "off": off, "on": {"c2al": settings(hidden=[7])}}
    folders = {name: tmp_path / name for name in auxiliary}
    run_ranks(train_all, world_size, [_run(data, folders[n], auxiliary=a) for n, a in auxiliary.items()])
    assert _weights(folders["plain"]) == _weights(folders["off"])
    plain, off_losses, on = (_losses(folder, "bce") for folder in folders.values())
    assert plain == off_losses
    # with heads: the same start and the same random numbers (dropout), then another way
    assert on[0] == plain[0] and on[1:] != plain[1:]


@pytest.mark.parametrize("world_size", [1, 2])
def test_resumed_is_bit_identical_to_uninterrupted(data: Path, tmp_path: Path, world_size: int) -> None:
    whole, halves = (_run(data, tmp_path / n, auxiliary={"c2al": settings(hidden=[7])}) for n in ("whole", "halves"))
    run_ranks(train_all, world_size, [whole, merged(halves, {"train": {"steps": 5}}), halves])
    assert _weights(tmp_path / "whole") == _weights(tmp_path / "halves")
    assert _losses(tmp_path / "whole", "c2al/tail") == _losses(tmp_path / "halves", "c2al/tail")


def _attempts(rank: int, world_size: int, runs: list[dict[str, Any]]) -> list[str]:
    said = []
    for run in runs:
        try:
            train_all(rank, world_size, [run])
            said.append("trained")
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_a_changed_file_of_cohorts_is_refused_and_a_moved_one_is_not(data: Path, tmp_path: Path) -> None:
    first, moved, changed = (tmp_path / f"{name}.json" for name in ("first", "moved", "changed"))
    for path in (first, moved):
        path.write_text(json.dumps({**COHORTS, "found": path.name}))  # what is not read may differ too
    changed.write_text(json.dumps({**COHORTS, "head": {"domain": 1}}))
    runs = [
        _run(data, tmp_path / "run", auxiliary={"c2al": settings(cohorts=str(path))}, train={"steps": steps})
        for path, steps in ((first, 4), (moved, 6), (changed, 8))
    ]
    said = run_ranks(_attempts, 1, runs)[0]
    assert said[:2] == ["trained", "trained"]
    assert "auxiliary.c2al.cohorts.head.domain: 2 -> 1" in said[2] and "checkpoint.renew=[c2al]" in said[2]


def _loaded(rank: int, world_size: int, run: dict[str, Any], steps: int) -> dict[str, torch.Tensor]:
    """Parameters of the checkpoint of a step, by name, from its own file."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    checkpoint = next(c for c in find(Path(run["run"]["dir"]) / "checkpoints") if c.step == steps)
    dcp_to_torch_save(checkpoint.path, checkpoint.path / "whole.pt")
    state = torch.load(checkpoint.path / "whole.pt", weights_only=False)
    return {**state["model"], **{f"state.{n}": s for n, s in state["optimizer"].items()}}


def test_heads_come_and_go_by_an_explicit_word_only(data: Path, tmp_path: Path, capsys) -> None:
    plain = _run(data, tmp_path / "run", train={"steps": 4}, checkpoint={"keep": 9})
    on = merged(plain, {"auxiliary": {"c2al": settings()}, "train": {"steps": 5}})
    allowed = merged(on, {"checkpoint": {"renew": ["c2al"]}})
    gone = merged(plain, {"train": {"steps": 9}})
    runs = [plain, on, allowed, merged(allowed, {"train": {"steps": 7}}), gone]
    said = run_ranks(_attempts, 1, [*runs, merged(gone, {"checkpoint": {"renew": ["c2al"]}})])[0]
    assert [text == "trained" for text in said] == [True, False, True, True, False, True]
    assert "auxiliary.c2al.lambda_head: nothing -> 0.5" in said[1]
    assert "auxiliary.c2al.lambda_head: 0.5 -> nothing" in said[4]
    out = capsys.readouterr().out
    # the second run by the same config goes on with the heads of the first
    assert out.count("auxiliary c2al: starts anew") == 1 and out.count("auxiliary c2al: dropped") == 1


def test_heads_that_are_new_start_as_they_would_in_a_new_run(data: Path, tmp_path: Path) -> None:
    """Adam moves every parameter by the learning rate in its first step, and by less in any later one."""
    plain = _run(data, tmp_path / "run", train={"steps": 4}, optim={"clip_norm": None}, checkpoint={"keep": 9})
    more = {"auxiliary": {"c2al": settings()}, "train": {"steps": 5}, "checkpoint": {"renew": ["c2al"]}}
    run_ranks(train_all, 1, [plain, merged(plain, more)])
    (found,) = run_ranks(_loaded, 1, plain, 5)
    (fresh,) = run_ranks(_initial, 1, merged(plain, more))
    for name, start in fresh.items():
        moved = (found[name] - start).abs()
        moved = moved[moved > 0]  # an idle column of the representation moves nothing
        assert len(moved) > 0
        torch.testing.assert_close(moved, torch.full_like(moved, 0.01), rtol=1e-3, atol=0)
        assert found[f"state.{name}"]["step"] == 1


def _initial(rank: int, world_size: int, run: dict[str, Any]) -> dict[str, torch.Tensor]:
    model, _ = build(from_mapping(run))
    return {n: v for n, v in model.state_dict().items() if n.startswith(AUXILIARIES)}


@pytest.mark.parametrize("name", list(MODELS))
def test_the_export_has_no_heads_and_scores_as_the_trained_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Bit for bit, and with the names and shapes of a model that never had heads; two-layer tables to rounding."""
    row = {"domain": {"num_ids": 3}, "row": {"column": "row"}}
    prior = {"prior": ["user"]} if name == "crocodile" else {}
    model = {"model": {**MODELS[name]["model"], **prior}}
    c2al = {"auxiliary": {"c2al": settings(hidden=[5])}, "schema": {"groups": row}, "data": {"test": str(data)}}
    folder = tmp_path / "run"
    run = {**values(data, folder, **merged(merged(MODELS[name], c2al), {"train": {"steps": 12}})), **model}
    plain = merged(run, {"run": {"dir": str(tmp_path / "plain")}})
    plain.update(auxiliary={}, embeddings={})
    run_ranks(train_all, 2, [run, plain])
    run_ranks(_evaluated, 1, run)
    cli.main(["export", str(folder / "config.yaml")])
    assert "c2al" not in (folder / "export" / "config.yaml").read_text()
    tensors = read(folder / "export" / "model.safetensors")
    with StoredModel(find(tmp_path / "plain" / "checkpoints")[-1].path) as stored:
        never = {tensor: part.shape for tensor, part in stored.tensors.items()}
    assert {tensor: tuple(value.shape) for tensor, value in tensors.items()} == never
    cli.main(["predict", str(folder / "export"), str(data), str(tmp_path / "out.parquet"), "keep=[row]"])
    served, trained = (pq.read_table(p).sort_by("row") for p in (tmp_path / "out.parquet", folder / "trained.parquet"))
    logits = [t["logit_click"].to_numpy() for t in (served, trained)]
    # Crocodile multiplies the rows of a domain together, and predict has other batches
    tolerance = {"mlet": 1e-5, "crocodile": 1e-6}.get(name, 0)
    assert np.std(logits[0]) > 0.01 and np.abs(logits[0] - logits[1]).max() <= tolerance


def _evaluated(rank: int, world_size: int, run: dict[str, Any]) -> None:
    evaluate.run(from_mapping(merged(run, {"evaluate": {"predictions": run["run"]["dir"] + "/trained.parquet"}})))


def test_the_best_weights_from_before_the_heads_came_are_restored(data: Path, tmp_path: Path) -> None:
    """Also by a later start with the same config, when nothing is renewed any more."""
    stop = {"train": {"eval_every": 2, "early_stopping": {"patience": 50}}, "data": {"validation": str(data)}}
    plain = _run(data, tmp_path / "run", **merged(stop, {"train": {"steps": 4}}))
    worse = {"optim": {"tables": {"lr": 30.0}}, "auxiliary": {"c2al": settings()}, "checkpoint": {"renew": ["c2al"]}}
    runs = [merged(plain, {**worse, "train": {"steps": steps}}) for steps in (6, 8)]
    first, second, third = run_ranks(train_all, 1, [plain, *runs])[0]
    assert second["best_step"] == third["best_step"] == first["best_step"] == 4
    assert third["metrics"]["validation"] == first["metrics"]["validation"]
