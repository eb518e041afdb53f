"""`dist-rec init`: its guesses on small files of every kind; what it writes loads, reads every row and trains."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest

from dist_rec import init, train
from dist_rec.cli import main as cli
from dist_rec.config import load
from dist_rec.data import synthetic
from dist_rec.data.footers import check_columns, read_footers
from dist_rec.data.loader import Loader
from dist_rec.training.checkpoint import CheckpointConfig
from tests.ranks import run_ranks

SHARED = Path(__file__).parents[2] / "shared" / "data"
N = 2000


def columns(**more):
    rng = np.random.default_rng(0)
    return {
        "click": rng.integers(0, 2, N),
        "item_id": rng.integers(0, 50, N),
        "price": rng.normal(size=N),
        **more,
    }


def write(path, statistics=True, row_group_size=500, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns(**more)), path, row_group_size=row_group_size, write_statistics=statistics)
    return path


@pytest.fixture
def start(tmp_path, monkeypatch, capfd):
    """Runs `dist-rec init` in a folder of its own; returns (config, its text, what was printed)."""
    monkeypatch.chdir(tmp_path)

    def run(data, *arguments):
        init.main([str(data), "-o", "c.yaml", "--force", *arguments])
        return load("c.yaml"), Path("c.yaml").read_text(), capfd.readouterr().out

    return run


def refused(capfd, *arguments):
    with pytest.raises(SystemExit) as stopped:
        init.main([str(a) for a in arguments])
    return str(stopped.value.code) + capfd.readouterr().err


def reads_all(config, split="train"):
    """Rows that a Loader reads, without a DataError; and what the policies did."""
    footers = read_footers(getattr(config.data, split))
    check_columns(footers, config.schema)
    order = {"rank": 0, "world_size": 1, "seed": 0, "shuffle": False, "epochs": 1}
    loader = Loader(config.data, config.schema, footers, batch_size=config.data.batch_size, **order)
    weights = [batch.weights for batch in loader]
    return sum(len(w) for w in weights), sum(sum(f.row_group_rows) for f in footers), dict(loader.counts)


def _train(rank, world_size, path, overrides):
    train.run(load(path, overrides))


def trains(path="c.yaml", *overrides):
    small = ["train.steps=3", "run.device=cpu", "run.dir=run", "report.tensorboard=false", *overrides]
    run_ranks(_train, 1, path, small)
    return json.loads(Path("run/result.json").read_text())["metrics"]


def test_synthetic_data_give_the_schema_that_was_written_by_hand(start):
    synthetic.write(synthetic.SyntheticConfig(path="data", rows=20_000, eval_rows=3000, users=500, items=200))
    config, text, _ = start("data")
    s = config.schema
    assert list(s.labels) == ["label"] and list(s.dense) == ["d0", "d1", "d2", "d3"]
    assert {n: c.num_ids for n, c in s.sparse.items() if n not in ("user_id", "item_id", "history")} == {
        "category": 50, "hour": 24, "domain": 3, "cohort": 4,
    }  # fmt: skip
    assert s.sparse["history"].multi and 3 < s.sparse["history"].mean_length < 5
    assert s.dense["d3"].on_null == "fill" and s.dense["d3"].transform == "log1p"
    assert {n: g.column for n, g in s.groups.items()} == {"domain": "domain", "cohort": "cohort", "user": "user_id"}
    assert (config.metrics.by, config.metrics.grouped_auc) == (["domain", "cohort"], ["user"])
    assert (config.data.train, config.data.validation, config.data.test) == (
        "data/train", "data/validation", "data/test",
    )  # fmt: skip
    assert "No validation set" not in text
    for split in ("train", "validation", "test"):
        read, rows, _ = reads_all(config, split)
        assert read >= rows
    assert "checkpoint: {every: 1000}  # steps; a run that is started again goes on from" in text
    assert config.checkpoint == CheckpointConfig()  # what a run without the section does
    assert "validation" in trains()


@pytest.mark.parametrize("name", ["criteo1tb_80k/criteo1tb_80k_idx", "criteo1tb_80k/criteo1tb_80k_hash",
                                  "ml100k/ratings", "yelp_hin/reviews"])  # fmt: skip
@pytest.mark.parametrize("sample_rows", ["200000", "8000"])
def test_real_data_sets_load_and_are_read_to_the_end(start, name, sample_rows):
    path = SHARED / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"{path} is not there: real data sets are not part of the project")
    config, text, _ = start(path, "--sample-rows", sample_rows)
    read, rows, counts = reads_all(config)
    assert read >= rows
    assert not any("out_of_range" in key for key in counts) or "hash" in name
    if "criteo" in name:
        assert (len(config.schema.dense), len(config.schema.sparse)) == (13, 26)
        assert {c.out_of_range for c in config.schema.sparse.values()} == {"hash" if "hash" in name else "error"}
        assert config.schema.dense["i1"].on_null == "fill" and config.schema.dense["i12"].transform == "log1p"
    else:
        assert "rating" not in config.schema.dense and re.search(r"leak[\s\S]*\n *# rating: ", text)
        assert config.metrics.grouped_auc == ["user"]
    if "yelp" in name:
        assert config.metrics.by == ["domain"] and config.schema.dense["n_friends"].transform == "log1p"
        assert config.schema.sparse["user_id"].num_ids == 16240
    if "ml100k" in name:
        assert "timestamp" not in [*config.schema.dense, *config.schema.sparse]
        assert "by time (column 'timestamp')" in text


def test_files_of_every_kind(start, tmp_path):
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 4, N)
    lists = [rng.integers(0, 30, n).tolist() for n in lengths]
    lists[7] = None
    weights = [rng.random(n).tolist() for n in lengths]
    weights[7] = None
    write(
        tmp_path / "a.parquet",
        history=lists,
        history_scores=pa.array(weights, pa.list_(pa.float32())),
        topics=pa.array([[1, None, 2]] * N, pa.list_(pa.int32())),
        vector=pa.array(rng.random((N, 4)).tolist(), pa.list_(pa.float32(), 4)),
        brand=pa.array([None if i % 9 == 0 else i % 40 for i in range(N)], pa.int16()),
        place=np.where(np.arange(N) % 5 == 0, -1, rng.integers(0, 9, N)),
        hashed=rng.integers(-(2**63), 2**63 - 1, 300)[rng.integers(0, 300, N)],
        wide=pa.array(rng.integers(2**63, 2**64 - 1, 300, dtype=np.uint64)[rng.integers(0, 300, N)]),
        n_views=rng.integers(0, 5, N),
        delta=rng.integers(-90, 90, N),
        flag=rng.integers(0, 2, N).astype(bool),
        holes=np.where(np.arange(N) % 3 == 0, np.nan, rng.random(N)),
        importance=rng.random(N),
        City=rng.integers(0, 30, N),
        title=["x"] * N,
        day=pa.array(np.arange(N), pa.timestamp("s")),
        seen_id=rng.integers(0, 9, N).astype(float),
        odd=[{"a": 1}] * N,
        same=np.ones(N, int),
        nothing=pa.array([None] * N, pa.float32()),
        boundless=np.where(np.arange(N) == 3, np.inf, 1.0),
        split=rng.integers(0, 2, N),
        row_id=rng.permutation(N),
        converted=rng.integers(0, 2, N),
        **{"a.b": rng.integers(0, 9, N), "no": rng.integers(0, 9, N), "x: ${y}, [z]": rng.random(N)},
    )
    config, text, printed = start("a.parquet")
    s = config.schema
    assert list(s.labels) == ["click"] and s.weight.column == "importance"
    assert list(s.dense) == ["price", "n_views", "delta", "flag", "holes", "x: ${y}, [z]"]
    assert list(s.sparse) == ["item_id", "history", "topics", "brand", "place", "hashed", "wide", "City", "no"]
    assert (s.sparse["history"].weights, s.sparse["history"].on_null) == ("history_scores", "empty")
    assert (s.sparse["topics"].on_null, s.sparse["brand"].on_null, s.sparse["place"].out_of_range) == (
        "empty", "reserved", "reserved",
    )  # fmt: skip
    for name in ("hashed", "wide"):
        assert (s.sparse[name].out_of_range, s.sparse[name].num_ids) == ("hash", 1200)
    assert s.dense["holes"].on_null == "fill" and s.dense["holes"].fill == pytest.approx(0.5, abs=0.05)
    assert s.groups["domain"].column == "City" and config.metrics.by == []  # 30 cities are too many for a report
    for name, why in {"title": "is text", "day": "is a time", "vector": "lengths of no list", "seen_id": "as floats",
                      "odd": "no schema can hold", "same": "constant", "nothing": "held no value", "a.b": "rename",
                      "boundless": "infinite", "split": "which split", "row_id": "value of its own",
                      "converted": "second target"}.items():  # fmt: skip
        assert re.search(rf"^  {re.escape(name)}: .*{why}", printed, re.M), name
        assert re.search(rf"^ +# +{re.escape(name)}: ", text, re.M), name
    assert max(map(len, text.splitlines())) <= 120
    assert reads_all(config)[2] == {
        "history.null=empty": 1, "topics.null_in_list=empty": N, "brand.null=reserved": 223,
        "place.out_of_range=reserved": 400, "hashed.out_of_range=hash": N, "wide.out_of_range=hash": N,
        "holes.null=fill": 667,
    }  # fmt: skip
    assert np.isfinite(trains()["train"]["ne"])


def test_without_statistics_the_largest_id_comes_from_the_sample_and_larger_ones_are_counted(start, tmp_path):
    ids = np.arange(N) % 90
    ids[np.arange(0, N, 100)] = 500
    write(tmp_path / "a.parquet", statistics=False, ad=ids)
    config, text, _ = start("a.parquet", "--sample-rows", "60")
    ad = config.schema.sparse["ad"]
    assert (ad.num_ids, ad.out_of_range) == (99, "reserved") and "in the SAMPLE" in text
    assert reads_all(config)[2] == {"ad.out_of_range=reserved": 20}
    config, _, _ = start("a.parquet")  # all rows: known
    assert (config.schema.sparse["ad"].num_ids, config.schema.sparse["ad"].out_of_range) == (501, "error")


def test_one_sparse_feature_alone_gets_a_model_that_takes_it(start, tmp_path):
    pq.write_table(pa.table({"y": [0, 1] * 40, "item": np.arange(80) % 7}), tmp_path / "a.parquet")
    config, _, _ = start("a.parquet")
    assert type(config.model).__module__.endswith("dcn") and list(config.schema.labels) == ["y"]
    trains()


def test_the_label_is_found_by_name_or_as_the_only_zeros_and_ones(start, tmp_path, capfd):
    other = {"opened": np.arange(N) % 2}
    write(tmp_path / "a.parquet", **other)
    assert list(start("a.parquet")[0].schema.labels) == ["click"]
    assert list(start("a.parquet", "--label", "opened")[0].schema.labels) == ["opened"]
    assert "click" not in start("a.parquet", "--label", "opened")[0].schema.sparse
    plain = {name: values for name, values in columns(**other).items() if name != "click"}
    pq.write_table(pa.table(plain), tmp_path / "b.parquet")
    assert list(start("b.parquet")[0].schema.labels) == ["opened"]
    pq.write_table(pa.table({**plain, "b": np.arange(N) % 2}), tmp_path / "c.parquet")
    said = refused(capfd, "c.parquet", "-o", "new.yaml")
    assert "no label found" in said and "--label NAME" in said and "opened, b" in said
    pq.write_table(pa.table({"item": [1, 2, 3]}), tmp_path / "d.parquet")
    assert "only 0 and 1: none" in refused(capfd, "d.parquet", "-o", "new.yaml")
    assert "no such column" in refused(capfd, "c.parquet", "-o", "new.yaml", "--label", "clicks")
    assert "0 to 49, and a binary label" in refused(capfd, "c.parquet", "-o", "new.yaml", "--label", "item_id")
    assert not Path("new.yaml").exists()


def test_null_labels_are_for_the_user_to_decide(start, tmp_path):
    label = pa.array([None if i == 4 else i % 2 for i in range(N)], pa.int8())
    write(tmp_path / "a.parquet", click=label)
    config, text, printed = start("a.parquet")
    assert config.schema.labels["click"].on_null == "error"
    assert "decide: label 'click': 1 of 2,000" in printed and "DECIDE" in text


def test_splits_are_found_as_folders_and_as_files(start, tmp_path):
    for name in ("x/training/1", "x/valid/1", "y/train", "y/test", "z/part-0"):
        write(tmp_path / f"{name}.parquet")
    found = [start(folder)[0].data for folder in ("x", "y/", "z", f"{tmp_path}/x")]
    assert [(d.train, d.validation, d.test) for d in found] == [
        ("x/training", "x/valid", None),
        ("y/train.parquet", None, "y/test.parquet"),
        ("z", None, None),
        (f"{tmp_path}/x/training", f"{tmp_path}/x/valid", None),
    ]


def test_splits_are_found_by_a_uri_with_options(tmp_path, monkeypatch):
    for name in ("train/1", "test/2"):
        write(tmp_path / "bucket" / f"{name}.parquet")
    tree = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    monkeypatch.setattr("dist_rec.data.footers._file_system", lambda uri: (tree, "bucket"))
    found = init.find_splits("s3://bucket?region=x")
    assert (found.train, found.test) == ("s3://bucket/train?region=x", "s3://bucket/test?region=x")


def test_refusals_say_what_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    good = write(tmp_path / "a.parquet")
    Path("old.yaml").write_text("mine")
    assert "exists already" in refused(capfd, good, "-o", "old.yaml")
    assert Path("old.yaml").read_text() == "mine"
    assert "is a folder" in refused(capfd, good, "-o", ".")
    assert "no such file or folder" in refused(capfd, "none", "-o", "c.yaml")
    Path("empty").mkdir()
    assert "no *.parquet file" in refused(capfd, "empty", "-o", "c.yaml")
    Path("cut.parquet").write_bytes(good.read_bytes()[:2000])
    assert "cut.parquet: is not Parquet or is cut short" in refused(capfd, "cut.parquet", "-o", "c.yaml")
    pq.write_table(pa.table({"click": pa.array([], pa.int8())}), "rows.parquet")
    assert "no rows at all" in refused(capfd, "rows.parquet", "-o", "c.yaml")
    pq.write_table(pa.table({"click": [0, 1], "x": [0.5, 1.5], "s": ["a", "b"]}), "ids.parquet")
    said = refused(capfd, "ids.parquet", "-o", "c.yaml")
    assert "no column can be an embedding's ids" in said and "s: is text" in said
    assert "cannot be written" in refused(capfd, good, "-o", "old.yaml/c.yaml")
    assert "--sample-rows: is '0'" in refused(capfd, good, "-o", "c.yaml", "--sample-rows", "0")
    assert "--output" in refused(capfd, good) and "--lable" in refused(capfd, good, "-o", "c.yaml", "--lable", "x")
    assert not Path("c.yaml").exists()


def test_help_and_the_verb(tmp_path, monkeypatch, capfd):
    for arguments in (["--help"], ["data", "-h"]):
        with contextlib.suppress(SystemExit):
            cli(["init", *arguments])
        assert "--sample-rows N" in capfd.readouterr().out
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet")
    cli(["init", "a.parquet", "-o", "deep/er/c.yaml"])
    assert "label click" in capfd.readouterr().out and load("deep/er/c.yaml").run.dir == "runs/c"
