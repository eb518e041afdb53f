"""The verbs of `dist-rec`: what they print, what they leave in the run folder, and that they agree with each other."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from dist_rec import cli, evaluate, plan, train
from dist_rec.config import load
from dist_rec.metrics.binary import auc
from tests.ranks import run_ranks
from tests.runs import DOMAINS, reports, values, write

ROWS, EVAL_ROWS = 300, 157


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train, validation and test."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train", ROWS)
    write(folder / "validation", EVAL_ROWS, seed=6)
    write(folder / "test", EVAL_ROWS, seed=7)
    return folder


def _card(data: Path, folder: Path, **sections: Any) -> Path:
    """A config file for a run in `folder` with all three splits."""
    paths = {"validation": str(data / "validation"), "test": str(data / "test")}
    metrics = {"by": ["domain"], "grouped_auc": ["user"]}
    config = values(data / "train", folder, **{"data": paths, "metrics": metrics, **sections})
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def _enter(rank: int, world_size: int, entry: str, arguments: list[str]) -> str:
    """What an entry prints on this rank."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        {"train": train, "evaluate": evaluate, "plan": plan}[entry].main(arguments)
    return out.getvalue()


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluate_says_what_train_said(data, tmp_path, world_size):
    """And the predictions it writes hold every row once, in the order of the files, and give the same AUC."""
    card, folder, out = _card(data, tmp_path / "run"), tmp_path / "run", tmp_path / "p" / "predictions.parquet"
    run_ranks(_enter, world_size, "train", [str(card)])
    result = json.loads((folder / "result.json").read_text())
    # the config in the folder is enough to evaluate by
    printed = run_ranks(_enter, world_size, "evaluate", [str(folder / "config.yaml"), f"evaluate.predictions={out}"])
    evaluated = json.loads((folder / "evaluation-test.json").read_text())
    assert evaluated["split"] == "test" and evaluated["step"] == result["step"]
    assert evaluated["metrics"] == result["metrics"]["test"]
    assert [bool(text) for text in printed] == [True] + [False] * (world_size - 1)
    assert f"{evaluated['metrics']['auc']:.5f}" in printed[0]

    rows = pq.read_table(out)
    columns = {"logit_click", "probability_click", "label_click", "weight", "row", "domain", "user"}
    assert set(rows.column_names) == columns
    assert rows.column("row").to_pylist() == list(range(EVAL_ROWS))
    got = auc(*(rows.column(name).to_numpy() for name in ("logit_click", "label_click", "weight")))
    assert got == pytest.approx(result["metrics"]["test"]["auc"], abs=1e-12)
    # each row's own label, and not its neighbour's
    truth = pq.read_table(data / "test")
    labels = dict(zip(truth.column("row").to_pylist(), truth.column("click").to_pylist(), strict=True))
    assert dict(zip(rows.column("row").to_pylist(), rows.column("label_click").to_pylist(), strict=True)) == labels


def test_evaluate_takes_a_split_a_step_and_other_files(data, tmp_path):
    card, folder = _card(data, tmp_path / "run", checkpoint={"every": 5, "keep": 9}), tmp_path / "run"
    run_ranks(_enter, 2, "train", [str(card)])
    final = json.loads((folder / "result.json").read_text())
    run_ranks(_enter, 1, "evaluate", [str(card), "evaluate.split=validation"])
    metrics = json.loads((folder / "evaluation-validation.json").read_text())["metrics"]
    assert metrics == pytest.approx(final["metrics"]["validation"], rel=1e-6)
    run_ranks(_enter, 1, "evaluate", [str(card), f"data.test={data}/validation", "evaluate.step=5"])
    early = json.loads((folder / "evaluation-test.json").read_text())
    assert early["step"] == 5 and early["metrics"]["ne"] != metrics["ne"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.step=4"], "step-00000004 cannot be used: meta.json"),
        (["run.dir=/tmp/never_trained_here"], "/tmp/never_trained_here/checkpoints has no complete checkpoint; train"),
        (["data.test=null"], "data.test: is empty; set it, or choose evaluate.split="),
        (["evaluate.predictions=/proc/p.parquet"], "evaluate.predictions: is '/proc', but '/proc' cannot be written"),
        (["evaluate.predictions=tests"], "evaluate.predictions: is 'tests', which is a folder"),
        (["embeddings.pooling=mean"], "embeddings.pooling: sum -> mean"),  # as many parameters, other predictions
        (["schema.dense.d0.mean=5.0"], "schema.dense.d0.mean: 0.0 -> 5.0"),
    ],
)
def test_evaluate_without_what_it_needs_says_so(data, tmp_path, overrides, message):
    card = _card(data, tmp_path / "run", train={"steps": 3})
    run_ranks(_enter, 1, "train", [str(card)])
    (said,) = run_ranks(_ends, 1, "evaluate", [str(card), *overrides])
    assert said.startswith("error: ") and message in said


def _ends(rank: int, world_size: int, entry: str, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as end:
        _enter(rank, world_size, entry, arguments)
    return str(end.value.code)


def test_a_run_without_checkpoints_on_its_way_says_so_at_its_start(data, tmp_path):
    said = "no checkpoint before the end: a run that is stopped is lost; set checkpoint.every to a number"
    for folder, overrides, says in (("default", [], False), ("off", ["checkpoint.every=null"], True)):
        card = _card(data, tmp_path / folder, train={"steps": 2})
        (printed,) = run_ranks(_enter, 1, "train", [str(card), *overrides])
        assert (said in printed.partition("train  step")[0]) == says


def test_the_run_folder(data, tmp_path):
    """Its layout, and the keys that scripts of others rely on."""
    card = _card(
        data,
        tmp_path / "run",
        train={"eval_every": 4},
        report={"every": 3, "tensorboard": True},
        checkpoint={"every": 4},
    )
    (printed, _) = run_ranks(_enter, 2, "train", [str(card), "run.seed=4"])
    folder = tmp_path / "run"
    names = {"config.yaml", "plan.txt", "metrics.jsonl", "result.json", "checkpoints", "tb"}
    assert {p.name for p in folder.iterdir()} == names
    assert load(str(folder / "config.yaml")) == load(str(card), ["run.seed=4"])
    plan_text = (folder / "plan.txt").read_text()
    assert plan_text.split()[:4] == ["table", "rows", "width", "pooling"] and "main_user" in plan_text
    assert plan_text in printed and "pipelined: 1 of 1 sharded modules" in printed
    assert list((folder / "tb").glob("events.*"))

    steps = math.ceil(ROWS / 32)
    lines = reports(folder)
    assert [line["step"] for line in lines if line["split"] == "train"] == [3, 6, 9, steps]
    assert [line["step"] for line in lines if line["split"] == "validation"] == [4, 8, steps]
    assert [line["step"] for line in lines if line["split"] == "test"] == [steps]
    measures = ["ne", "log_loss", "auc", "calibration", "gauc/user"]
    suffixes = ["", *(f"/domain={d}" for d in range(DOMAINS))]
    expected = {f"{m}{s}" for m in measures for s in suffixes}
    for line in lines:
        pace = {"examples_per_second", "data_wait_share"} if line["split"] == "train" else set()
        assert set(line) == {"step", "examples", "split", "metrics"} | pace
        assert set(line["metrics"]) == expected | ({"loss/bce"} if line["split"] == "train" else set())
    assert [line["examples"] for line in lines if line["split"] == "train"] == [96, 192, 288, ROWS]

    result = json.loads((folder / "result.json").read_text())
    assert set(result) == {
        "metrics", "step", "best_step", "examples", "examples_per_second", "data_wait_share", "train_seconds",
        "wall_seconds", "world_size", "device", "data_policies", "versions",
    }  # fmt: skip
    assert (result["step"], result["examples"], result["world_size"], result["device"]) == (steps, ROWS, 2, "cpu")
    assert {split: set(m) for split, m in result["metrics"].items()} == dict.fromkeys(
        ("train", "validation", "test"), expected
    )
    assert result["metrics"]["validation"] == lines[-2]["metrics"]
    assert {"python", "torch", "torchrec"} <= set(result["versions"])
    assert 0 <= result["data_wait_share"] <= 1 and result["examples_per_second"] > 0
    assert printed.rstrip().splitlines()[-4 - 3 * DOMAINS].split()[:2] == ["split", "ne"]


# The command


def test_help_of_the_command_and_of_each_verb(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"\n  {verb}" in text
        with pytest.raises(SystemExit) as end:
            cli.main([verb, "--help"])
        assert end.value.code == 0
        assert f"usage: dist-rec {verb}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("verb", "hint"), [("trian", "did you mean 'train'?"), ("xyz", "verbs: init, prepare, train, eval")]
)
def test_an_unknown_verb_is_named(verb, hint):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "config.yaml"])
    assert end.value.code.startswith(f"dist-rec: '{verb}' is not a verb; ") and hint in end.value.code


# Plans


def _plan_card(tmp_path: Path, **sparse: Any) -> str:
    config = values("no/such/data", tmp_path / "run", schema={"sparse": sparse}, run={"device": "cpu"})
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_a_plan_for_64_ranks_needs_no_ranks_and_no_data(tmp_path, capsys):
    card = _plan_card(tmp_path, big={"num_ids": 400_000_000})
    arguments = ["ranks=64", "embeddings.tables.big.sharding=row_wise", "embeddings.tables.user.sharding=table_wise"]
    cli.main(["plan", card, *arguments])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[1:-1]}
    assert rows["main_big"][1:5] == ["400,000,000", "8", "sum", "row_wise"] and rows["main_big"][6] == "0-63"
    assert rows["main_user"][4] == "table_wise" and rows["main_user"][6].isdigit()
    alike = [part.removeprefix("rank ").split(": ") for part in lines[-1].split(": ", 1)[1].split(", ")]
    load_of = {rank: float(size) for ranks, size in alike for rank in _numbers(ranks)}
    assert sorted(load_of) == list(range(64)) and len(alike) < 8
    # 400 million rows of 32 bytes over 64 ranks
    assert load_of[5] == pytest.approx(400e6 * 32 / 64 / 2**20, rel=0.01)


def _numbers(ranges: str) -> list[int]:
    """0-2,5 -> 0, 1, 2, 5."""
    bounds = [[int(number) for number in part.split("-")] for part in ranges.split(",")]
    return [rank for first, *last in bounds for rank in range(first, (last or [first])[0] + 1)]


def test_a_plan_that_cannot_fit_names_the_table_the_bytes_and_the_fix(tmp_path):
    card = _plan_card(tmp_path, big={"num_ids": 400_000_000})
    said = _ends(0, 1, "plan", [card, "ranks=2", "sharding.device_memory_gb=2", "embeddings.kernel=fused"])
    size, rank_size = 400e6 * 32 / 2**30, 2.0
    assert said.startswith("error: no plan fits 4 tables on 2 rank(s)")
    assert f"largest table: main_big, 400,000,000 x 8 = {size:.3f} GiB" in said
    assert f"needed: {size:.3f} GiB of weights" in said
    assert (
        f"available: {rank_size:.3f} GiB per rank (sharding.device_memory_gb), {2 * rank_size:.3f} GiB in all" in said
    )
    (needed,) = [int(word) for word in said[said.index("at least") :].split() if word.isdigit()][:1]
    # what it says would fit, fits
    plan.main(
        [card, f"ranks={needed}", "sharding.device_memory_gb=2", "embeddings.kernel=fused", f"ranks_per_node={needed}"]
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("ranks=many", "ranks: is 'many'; expected a whole number >= 1"),
        ("device=tpu", "device: is 'tpu'; expected cpu or cuda"),
        ("ranks=12", "ranks: is 12, which is no multiple of ranks_per_node, 8"),
    ],
)
def test_a_bad_argument_of_plan_is_named(tmp_path, argument, message):
    assert message in _ends(0, 1, "plan", [_plan_card(tmp_path), argument])
