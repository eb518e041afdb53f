"""The components end in the arguments torchrun would pass, render on every scheduler, and fail when a rank fails."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser
from torchx.components.component_test_base import ComponentTestCase
from torchx.specs import AppDef

from launch import components

ROOT = Path(__file__).parents[2]
PLACES = {
    "train": {"config": "c.yaml"},
    "evaluate": {"config": "c.yaml"},
    "cohorts": {"run": "runs/a $b", "data": "in/*.parquet"},
}
OVERRIDES = ["run.dir=runs/a b", "data.train=in/*.parquet", "run.name=${run.seed}$x"]


def torchx_run(*arguments: str, timeout: int = 100) -> subprocess.CompletedProcess[str]:
    """`torchx run` in the project's root, with this Python's scripts on the PATH."""
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [sys.executable, "-m", "torchx.cli.main", "run", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def rank_arguments(app: AppDef) -> list[str]:
    """What the shell and torchrun make of the app's command: module and arguments of a rank."""
    (role,) = app.roles
    assert role.entrypoint == "bash"
    torchrun, *words = shlex.split(role.args[1].replace("$$", "$"))
    assert torchrun == "torchrun"
    parsed = get_args_parser().parse_args(words)
    assert parsed.module
    return [parsed.training_script, *parsed.training_script_args]


@pytest.mark.parametrize("verb", list(PLACES))
def test_ranks_get_the_arguments_that_torchrun_would_pass(verb: str) -> None:
    by_hand = get_args_parser().parse_args(["-m", f"dist_rec.{verb}", *PLACES[verb].values(), *OVERRIDES])
    app = getattr(components, verb)(*OVERRIDES, **PLACES[verb], ranks=2)
    assert rank_arguments(app) == [by_hand.training_script, *by_hand.training_script_args]


def test_ranks_and_nodes_and_resources_reach_the_role() -> None:
    app = components.train(config="c.yaml", ranks=8, nodes=3, gpu=8, cpu=64, memMB=1000, env={"OMP_NUM_THREADS": "4"})
    (role,) = app.roles
    assert (role.num_replicas, role.resource.gpu, role.resource.cpu, role.resource.memMB) == (3, 8, 64, 1000)
    assert "--nnodes 3 --nproc_per_node 8" in role.args[1]
    assert role.env["OMP_NUM_THREADS"] == "4"


@pytest.mark.parametrize("verb", list(PLACES))
def test_cores_and_memory_are_by_default_those_of_all_ranks_of_a_node(verb: str) -> None:
    for ranks in (1, 8):
        app = getattr(components, verb)(**PLACES[verb], ranks=ranks, nodes=2, gpu=ranks)
        (role,) = app.roles
        assert (role.resource.cpu, role.resource.memMB) == (4 * ranks, 16384 * ranks)


def test_the_environment_of_one_app_does_not_leak_into_the_next() -> None:
    before = dict(components.ENV)
    components.train(config="c.yaml", env={"A": "1"}, debug=True)
    assert before == components.ENV


@pytest.mark.parametrize("verb", list(PLACES))
def test_torchx_reads_the_components(verb: str) -> None:
    ComponentTestCase().validate(components, verb)


@pytest.mark.parametrize("scheduler", ["local_cwd", "slurm", "kubernetes", "aws_batch"])
def test_a_dry_run_renders(scheduler: str) -> None:
    cluster = ["--nodes", "2", "--image", "repo/dist_rec:1"] if scheduler != "local_cwd" else []
    run = ["--dryrun", "-s", scheduler, "launch/components.py:train", "--config", "c.yaml", "--ranks", "2", *cluster]
    done = torchx_run(*run, "--", "train.steps=3")
    assert done.returncode == 0, done.stderr
    # Each scheduler quotes and wraps the command differently: compare its words.
    words = re.findall(r"\w+", done.stdout.partition("=== SCHEDULER REQUEST ===")[2])
    assert " m dist_rec train c yaml train steps 3 " in " ".join([*words, ""])


def test_without_a_scheduler_it_runs_on_this_machine() -> None:
    done = torchx_run("--dryrun", "launch/components.py:train", "--config", "c.yaml")
    assert done.returncode == 0, done.stderr
    assert "'log_dir': '.torchx/" in done.stdout  # which .torchxconfig gives to local_cwd alone


def test_a_local_run_passes_everything_on_unchanged(tmp_path: Path) -> None:
    done = torchx_run("-s", "local_cwd", "tests/launch/probe.py:component", "--config", str(tmp_path), "--", *OVERRIDES)
    assert done.returncode == 0, done.stderr
    seen = {"argv": [str(tmp_path), *OVERRIDES], "threads": "1", "world": "2"}
    assert [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())] == [seen, seen]


def test_a_card_trains_and_is_evaluated_through_torchx(tmp_path: Path) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    made = [f"data.{split}={data}/{split}" for split in ("train", "validation", "test")]
    small = [f"data.synthetic.path={data}", "data.synthetic.rows=8000", "data.synthetic.eval_rows=2000"]
    train = ["launch/components.py:train", "--config", "configs/smoke/dlrm.yaml", "--ranks", "2", "--"]
    done = torchx_run("-s", "local_cwd", *train, f"run.dir={run}", *made, *small, "train.steps=5", timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads((run / "result.json").read_text())
    assert (result["world_size"], result["examples"]) == (2, 5 * 2 * 512)
    evaluate = ["launch/components.py:evaluate", "--config", str(run / "config.yaml"), "--ranks", "1"]
    done = torchx_run("-s", "local_cwd", *evaluate, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "evaluation-test.json").read_text())["metrics"]["ne"]
    assert found == pytest.approx(result["metrics"]["test"]["ne"], rel=1e-6)


def test_a_failing_rank_ends_the_job_and_its_error_comes_first(tmp_path: Path) -> None:
    run = ["-s", "local_cwd", "tests/launch/probe.py:component", "--config", str(tmp_path), "--", "fail=1"]
    done = torchx_run(*run)
    assert done.returncode != 0
    assert "[1]:ValueError: rank 1 found a bad row" in done.stderr
    first = done.stderr.index("rank 1 found a bad row")
    for later in ("ChildFailedError", "SIGTERM", "Job finished: FAILED"):
        assert first < done.stderr.index(later)
