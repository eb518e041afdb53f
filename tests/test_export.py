"""`dist-rec export` and `dist-rec predict`: what was trained on any number of ranks is what a lone process serves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
import yaml

from dist_rec import cli, evaluate
from dist_rec.config import choice, from_mapping, load, to_mapping
from dist_rec.predict import _scoring_schema
from dist_rec.recommender import plain
from dist_rec.serving.tensor_file import read
from dist_rec.settings import Complaint, ConfigError
from dist_rec.training.checkpoint import find
from dist_rec.training.stored import StoredModel
from tests.ranks import run_ranks
from tests.runs import DOMAINS, merged, table, train_all, values, write

ROWS, TEST_ROWS = 300, 157
KINDS = ["row_wise", "table_wise", "data_parallel"]
MODELS = {
    "dlrm": {"name": "dlrm", "dim": 8, "bottom": [16], "top": [16]},
    "dcn": {"name": "dcn", "dim": 8, "deep": [16], "cross_layers": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train, test, and features: the rows of test without label and groups."""
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train", ROWS)
    write(folder / "test", TEST_ROWS, seed=7)
    whole = table(TEST_ROWS, seed=7).drop_columns(["click", "domain"])
    (folder / "features").mkdir()
    pq.write_table(whole.slice(0, 100), folder / "features" / "a.parquet", row_group_size=40)
    pq.write_table(whole.slice(100), folder / "features" / "b.parquet", row_group_size=40)
    return folder


def _run(data: Path, folder: Path, kind: str, model: str = "dlrm", **sections: Any) -> dict[str, Any]:
    own = {t: {"sharding": kind} for t in ("user", "item")} | {"tags": {"sharding": kind, "pooling": "mean"}}
    common = {
        "embeddings": {"tables": own},
        "data": {"test": str(data / "test")},
        "optim": {"tables": {"lr": 0.5}, "dense": {"lr": 0.05}},
        "train": {"steps": 7},
    }
    return {**values(data / "train", folder, **merged(common, sections)), "model": MODELS[model]}


def _evaluated(rank: int, world_size: int, runs: list[dict[str, Any]]) -> None:
    for run in runs:
        predictions = f"{run['run']['dir']}/predictions.parquet"
        evaluate.run(from_mapping(merged(run, {"evaluate": {"predictions": predictions}})))


def _exported(run: dict[str, Any], capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    """Exports a run by its folder's config and scores; what the two verbs printed."""
    folder = Path(run["run"]["dir"])
    capsys.readouterr()
    cli.main(["export", str(folder / "config.yaml"), *overrides])
    features = str(Path(run["data"]["test"]).with_name("features"))
    cli.main(["predict", str(folder / "export"), features, str(folder / "out.parquet"), "keep=[row]"])
    assert not dist.is_initialized()
    return capsys.readouterr().out


def _column(path: Path, name: str) -> np.ndarray:
    found = pq.read_table(path).sort_by("row")
    assert found.column("row").to_pylist() == list(range(TEST_ROWS))
    return found.column(name).to_numpy()


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_export_scores_as_evaluate_does(data, tmp_path, capsys, world_size):
    """Bit for bit for plain tables; to 1e-5 where two layers became one."""
    layers = {"plain": {}, "before": {"inner_dim": 32}, "after": {"inner_dim": 32, "project": "after"}}
    kinds = KINDS if world_size > 1 else KINDS[:1]  # one rank holds everything whatever it is called
    cases = [*product(["dlrm"], kinds, ("plain", "before")), ("dcn", "table_wise", "before")]
    cases += [("dlrm", "row_wise", "after")]
    runs = {c: _run(data, tmp_path / "-".join(c), c[1], c[0], embeddings=layers[c[2]]) for c in cases}
    run_ranks(train_all, world_size, list(runs.values()))
    run_ranks(_evaluated, 1, list(runs.values()))
    for case, run in runs.items():
        folder = Path(run["run"]["dir"])
        printed = _exported(run, capsys)
        expected = _column(folder / "predictions.parquet", "logit_click")
        got = _column(folder / "out.parquet", "logit_click")
        assert np.std(expected) > 0.05, "the model says something"
        assert np.abs(got - expected).max() <= (0 if case[2] == "plain" else 1e-5), case
        probability = _column(folder / "out.parquet", "probability_click")
        np.testing.assert_allclose(probability, 1 / (1 + np.exp(-expected.astype(np.float64))), rtol=1e-5)
        assert ("main_user" in printed) == (case[2] != "plain"), "each two-layer table has its error"


PRIOR = {"prior": ["user", "item"]}
NEEDED: dict[str, dict[str, Any]] = {"crocodile": PRIOR, "pepnet": {**PRIOR, "domain_features": ["item"]}}
AUXILIARIES: dict[str, dict[str, Any]] = {
    "crocodile": {"covariance": {"alpha": 0.1, "rows": 8}},
    "dhen": {"c2al": {"hidden": [4], "cohorts": {"axes": ["domain"], "edges": {"domain": None}, "head": {"domain": 0},
                      "tail": {"domain": 2}, "head_rate": 0.2, "tail_rate": 0.1, "head_mass": 0.3, "tail_mass": 0.3}}},
}  # fmt: skip


# those judged by retrieval export their towers apart: test_export_retrieval.py
ARCHS = choice("models")
LABELLED = [name for name in ARCHS.names() if getattr(ARCHS.load(name), "evaluation", "labels") == "labels"]


@pytest.mark.parametrize("model", LABELLED)
def test_every_arch_is_exported_and_served(data, tmp_path, capsys, model):
    """Those that read a group too; their auxiliaries are dropped, with what they had learnt."""
    run = _run(data, tmp_path / "run", "row_wise", embeddings={"inner_dim": 16}, auxiliary=AUXILIARIES.get(model, {}),
               schema={"groups": {"domain": {"num_ids": DOMAINS}}})  # fmt: skip
    run["model"] = {"name": model, "dim": 8, **NEEDED.get(model, {})}
    run_ranks(train_all, 2, [run])
    run_ranks(_evaluated, 1, [run])
    cli.main(["export", f"{tmp_path}/run/config.yaml"])
    cli.main(["predict", f"{tmp_path}/run/export", str(data / "test"), f"{tmp_path}/run/out.parquet", "keep=[row]"])
    scores = [_column(tmp_path / "run" / f"{name}.parquet", "logit_click") for name in ("predictions", "out")]
    assert np.std(scores[0]) > 0.01 and np.abs(scores[0] - scores[1]).max() < 1e-5
    with StoredModel(find(tmp_path / "run" / "checkpoints")[-1].path) as stored:
        dropped = {name for name in stored.tensors if name.startswith(("dense.auxiliaries.", "dense.objective."))}
    assert set(json.loads((tmp_path / "run" / "export" / "report.json").read_text())["dropped"]) == dropped
    assert bool(dropped) == (model in AUXILIARIES), "C2AL's heads have parameters, the covariance a count of its draws"
    printed = capsys.readouterr().out
    assert all(name in printed for name in dropped)


def test_tables_of_several_sets_in_one_are_served_so(data, tmp_path):
    run = _run(data, tmp_path / "run", "row_wise", embeddings={"layout": "wide"}, optim={"tables": {"name": "adagrad"}},
               schema={"groups": {"domain": {"num_ids": DOMAINS}}})  # fmt: skip
    run["model"] = {"name": "crocodile", "dim": 8, "prior_dim": 4, **PRIOR}
    run_ranks(train_all, 2, [run])
    run_ranks(_evaluated, 1, [run])
    cli.main(["export", f"{tmp_path}/run/config.yaml"])
    cli.main(["predict", f"{tmp_path}/run/export", str(data / "test"), f"{tmp_path}/run/out.parquet", "keep=[row]"])
    tables = [n for n in read(tmp_path / "run" / "export" / "model.safetensors") if "embedding_bags" in n]
    assert any("wide_user" in n for n in tables)
    scores = [_column(tmp_path / "run" / f"{name}.parquet", "logit_click") for name in ("predictions", "out")]
    assert np.std(scores[0]) > 0.01 and np.abs(scores[0] - scores[1]).max() < 1e-6


def test_names_and_shapes_are_those_of_a_model_trained_plain(data, tmp_path, capsys):
    """And the config beside them trains one."""
    run = _run(data, tmp_path / "run", "row_wise", embeddings={"inner_dim": 32, "tables": {"item": {"inner_dim": 16}}})
    run_ranks(train_all, 2, [run])
    _exported(run, capsys)
    config = load(str(tmp_path / "run" / "export" / "config.yaml"))
    assert config == plain(config) == plain(from_mapping(run)) != from_mapping(run)
    assert config.embeddings.inner_dim is None and config.embeddings.tables["item"].inner_dim is None
    assert config.embeddings.tables["tags"].pooling == "mean"
    again = merged(
        yaml.safe_load((tmp_path / "run" / "export" / "config.yaml").read_text()),
        {"run": {"dir": str(tmp_path / "plain")}},
    )
    run_ranks(train_all, 1, [again])
    tensors = read(tmp_path / "run" / "export" / "model.safetensors")
    with StoredModel(find(tmp_path / "plain" / "checkpoints")[-1].path) as stored:
        expected = {name: (t.shape, t.dtype) for name, t in stored.tensors.items()}
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == expected
    report = json.loads((tmp_path / "run" / "export" / "report.json").read_text())
    assert report["step"] == 7 and {t["table"]: (t["inner_dim"], t["dim"]) for t in report["tables"]} == {
        "main_user": (32, 8), "main_item": (16, 8), "main_tags": (32, 8)
    }  # fmt: skip


def test_a_chosen_step_is_exported_and_an_export_is_replaced(data, tmp_path, capsys):
    run = _run(data, tmp_path / "run", "table_wise", checkpoint={"every": 3, "keep": 9})
    run_ranks(train_all, 1, [run])
    folder, config = tmp_path / "run", str(tmp_path / "run" / "config.yaml")
    for step in (3, 6):
        cli.main(["export", config, f"export.step={step}"])
        assert json.loads((folder / "export" / "report.json").read_text())["step"] == step
        tensors = read(folder / "export" / "model.safetensors")
        with StoredModel(folder / "checkpoints" / f"step-{step:08d}") as stored:
            assert all(torch.equal(tensor, stored.tensors[name].whole()) for name, tensor in tensors.items())
    assert sorted(p.name for p in (folder / "export").iterdir()) == ["config.yaml", "model.safetensors", "report.json"]
    assert not list(folder.glob(".*tmp"))
    cli.main(["export", config, f"export.path={tmp_path}/elsewhere"])
    assert json.loads((tmp_path / "elsewhere" / "report.json").read_text())["step"] == 7, "the newest by default"


def test_a_run_of_gpus_is_exported_where_there_are_none(data, tmp_path):
    """A config that says how it was trained, by an optimiser and kernels that are not here, and on a device neither."""
    run = _run(data, tmp_path / "run", "table_wise", embeddings={"inner_dim": 16})
    run_ranks(train_all, 1, [run])
    folder = tmp_path / "run"
    config = to_mapping(load(str(folder / "config.yaml")))
    on_gpus = merged(config, {"run": {"device": "cuda"}, "optim": {"tables": {"name": "adam"}},
                              "embeddings": {"kernel": "fused_uvm_caching"}})  # fmt: skip
    if not torch.cuda.is_available():
        for device, wrong in (("cuda", "run.device"), ("auto", "optim.tables.name"), ("auto", "embeddings.kernel")):
            with pytest.raises(ConfigError, match=wrong):
                from_mapping(merged(on_gpus, {"run": {"device": device}}))
    (checkpoint,) = find(folder / "checkpoints")
    meta = checkpoint.path / "meta.json"
    meta.write_text(json.dumps({**checkpoint.meta, "config": on_gpus}))
    (folder / "config.yaml").write_text(yaml.safe_dump(on_gpus, sort_keys=False))
    cli.main(["export", str(folder / "config.yaml")])
    cli.main(["predict", str(folder / "export"), str(data / "features"), str(tmp_path / "out.parquet")])
    assert pq.read_metadata(tmp_path / "out.parquet").num_rows == TEST_ROWS


# Errors


@pytest.fixture(scope="module")
def exported(data, tmp_path_factory) -> Path:
    """A run folder with an export."""
    run = _run(data, tmp_path_factory.mktemp("runs") / "run", "row_wise", embeddings={"inner_dim": 16})
    run_ranks(train_all, 1, [run])
    cli.main(["export", f"{run['run']['dir']}/config.yaml"])
    return Path(run["run"]["dir"])


def _ends(*arguments: Any) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in arguments])
    return str(end.value.code)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["export.step=4"], "step-00000004 cannot be used"),
        (["run.dir=/tmp/never_trained_here"], "has no complete checkpoint; train first, or correct run.dir"),
        (["embeddings.inner_dim=32"], "embeddings.inner_dim: 16 -> 32"),
        (["model.top=[24]"], "model.top: "),
        (["export.path=tests"], "export.path: is 'tests', which exists and is no export"),
        (["export.path=/proc/export"], "export.path: is '/proc', but '/proc' cannot be written"),
    ],
)
def test_export_without_what_it_needs_says_so(exported, overrides, message):
    before = sorted(exported.rglob("*"))
    said = _ends("export", exported / "config.yaml", *overrides)
    assert message in said and said.startswith("error: ")
    assert sorted(exported.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: (e / "model.safetensors").unlink(), "model.safetensors is missing; name the folder that"),
        (lambda e: (e / "config.yaml").unlink(), "config.yaml is missing"),
        (lambda e: _cut(e / "model.safetensors"), "cut short"),
        (lambda e: _edit(e / "config.yaml", "dim: 8", "dim: 16"), "does not fit config.yaml beside it"),
        (lambda e: _edit(e / "config.yaml", "num_ids: 203", "num_ids: 204"), "main_user.weight is [203, 8]"),
    ],
)
def test_a_damaged_export_is_named(data, exported, tmp_path, change, message):
    export = tmp_path / "export"
    export.mkdir()
    for path in (exported / "export").iterdir():
        (export / path.name).write_bytes(path.read_bytes())
    change(export)
    said = _ends("predict", export, data / "features", tmp_path / "out.parquet")
    assert message in said and said.startswith("error: ")
    assert list(tmp_path.iterdir()) == [export]


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "EXPORT, DATA and OUT come first"),
        (["{export}", "{data}/nothing", "{out}"], "there is no such file or folder"),
        (
            ["{export}", "{data}/features", "{data}/features/a.parquet"],
            "which exists; choose another file, or set over",
        ),
        (
            ["{export}", "{data}/features", "{data}/features/a.parquet", "overwrite=true"],
            "which is a file of DATA; choose another file",
        ),
        (["{export}", "{data}/features", "/proc/out"], "OUT: is '/proc', but '/proc' cannot be written"),
        (["{export}", "{data}/features", "s3://bucket/out"], "only local files are written"),
        (["{export}", "{data}/features", "{out}", "keep=[usr]"], "keep: column 'usr' is not in"),
        (["{export}", "{data}/features", "{out}", "keep=[logit_click]"], "which is a column of scores"),
        (["{export}", "{data}/features", "{out}", "keep=[user,user]"], "names column 'user' twice"),
        (["{export}", "{data}/features", "{out}", "keep=user"], "keep: is 'user'; expected a list (text each)"),
        (["{export}", "{data}/features", "{out}", "batch=4"], "batch: is not a known key; did you mean 'batch_size'?"),
        (["{export}", "{data}/features", "{out}", "batch_size=0"], "batch_size: is 0; use at least 1"),
        (["{data}", "{data}/features", "{out}"], "is no export, or not a whole one"),
    ],
)
def test_a_bad_argument_of_predict_is_named(data, exported, tmp_path, arguments, message):
    names = {"export": exported / "export", "data": data, "out": tmp_path / "out.parquet"}
    said = _ends("predict", *[a.format(**names) for a in arguments], *([] if arguments else ["overwrite=true"]))
    assert message in said and said.startswith("error: ")
    assert not list(tmp_path.iterdir())


def _features(folder: Path, **columns: Any) -> Path:
    folder.mkdir()
    whole = table(100, seed=8)
    for name, values_ in columns.items():
        whole = whole.drop_columns([name])
        whole = whole if values_ is None else whole.append_column(name, values_)
    pq.write_table(whole, folder / "a.parquet", row_group_size=10)
    return folder


def test_data_that_do_not_fit_the_model_are_named_and_leave_no_output(exported, tmp_path):
    export, out = exported / "export", tmp_path / "out" / "x.parquet"
    said = _ends("predict", export, _features(tmp_path / "a", user=None), out)
    assert "column 'user' (sparse) is missing" in said
    said = _ends("predict", export, _features(tmp_path / "b", d0=pa.array(["x"] * 100)), out)
    assert "column 'd0' (dense) is string" in said
    assert not out.parent.exists(), "nothing was begun"
    ids = np.arange(100) % 50
    ids[97] = 9999
    said = _ends("predict", export, _features(tmp_path / "c", user=pa.array(ids)), out, "batch_size=8")
    assert "id 9999 is outside 0..202 at row 97" in said
    assert not list(out.parent.iterdir()), "what was written before the bad row is gone"


def test_out_has_the_row_groups_of_the_data_and_the_columns_asked_for(data, exported, tmp_path):
    """So what is in memory at a time is a row group, and not the data."""
    out = tmp_path / "out.parquet"
    arguments = ["predict", str(exported / "export"), str(data / "features"), str(out), "keep=[tags,row]"]
    cli.main([*arguments, "batch_size=7"])
    file = pq.ParquetFile(out)
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [40, 40, 20, 40, 17]
    source = pq.read_table(data / "features")
    found = file.read()
    assert found.column_names == ["tags", "row", "logit_click", "probability_click"]
    assert found.select(["tags", "row"]) == source.select(["tags", "row"]), "in the order of the data"
    cli.main([*arguments, "batch_size=64", "overwrite=true"])
    again = pq.read_table(out)
    np.testing.assert_allclose(again["logit_click"].to_numpy(), found["logit_click"].to_numpy(), atol=1e-6)


@dataclass
class _ByDomain:
    """Of an arch that will not be built without the group "domain"."""

    dim: int = 8
    inner: Any = field(default=None)

    def check(self, schema):
        if "domain" not in schema.groups:
            yield Complaint("domain", "is no group of the schema")

    def __getattr__(self, name):
        return getattr(self.inner, name)


def test_groups_are_read_if_the_model_needs_them(data, tmp_path):
    config = from_mapping(_run(data, tmp_path / "run", "row_wise", schema={"weight": {"column": "d0"}}))
    read_by_dlrm = _scoring_schema(config)
    assert (read_by_dlrm.groups, read_by_dlrm.labels, read_by_dlrm.weight) == ({}, {}, None)
    assert read_by_dlrm.columns() == ["d0", "user", "item", "tags"]
    config.model = _ByDomain(inner=config.model)
    assert _scoring_schema(config).columns() == ["d0", "user", "item", "tags", "domain"]
