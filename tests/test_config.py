"""What a config may say, and that everything wrong with one is said at once, with its full key and the fix."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_rec import prepare
from dist_rec.config import choice, from_mapping, load, read, to_yaml
from dist_rec.settings import ConfigError
from tests.runs import merged, values

ROOT = Path(__file__).parents[1]
ADAGRAD = {"tables": {"name": "adagrad"}}


def _complaints(config: dict[str, Any]) -> dict[str, str]:
    """key -> text of everything wrong with `config`."""
    with pytest.raises(ConfigError) as error:
        from_mapping(config)
    lines = str(error.value).splitlines()
    assert lines[0] == f"the config has {len(lines) - 1} problem{'s' if len(lines) > 2 else ''}:"
    return {c.key: c.text for c in error.value.complaints}


def _base(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    return values("unused", tmp_path / "run", **sections)


def test_the_base_of_these_tests_is_good(tmp_path):
    assert from_mapping(_base(tmp_path)).model.dim == 8


@pytest.mark.parametrize(
    ("sections", "key", "text"),
    [
        # unknown keys
        ({"trian": {}}, "trian", "did you mean 'train'?"),
        ({"train": {"stpes": 5}}, "train.stpes", "did you mean 'steps'?"),
        ({"train": {"zzz": 5}}, "train.zzz", "known: steps, epochs, precision"),
        ({"schema": {"sparse": {"user": {"nmu_ids": 3}}}}, "schema.sparse.user.nmu_ids", "did you mean 'num_ids'?"),
        ({"model": {"botom": [3]}}, "model.botom", "did you mean 'bottom'?"),
        ({"model": {"name": "dlmr"}}, "model.name", "is 'dlmr'; did you mean 'dlrm'?"),
        ({"objective": {"name": "xyz"}}, "objective.name", "known: bce"),
        ({"auxiliary": {"nothing_like_it": {}}}, "auxiliary.nothing_like_it", "'nothing_like_it'"),
        ({"embeddings": {"tables": {"usr": {}}}}, "embeddings.tables.usr", "matches no table; did you mean 'user'?"),
        # wrong types
        ({"train": {"steps": "many"}}, "train.steps", "is 'many'; expected an integer"),
        ({"train": {"steps": 1.5}}, "train.steps", "is 1.5"),
        ({"data": {"batch_size": True}}, "data.batch_size", "is True; expected an integer"),
        ({"data": {"train": 7}}, "data.train", "put it in quotes: '7'"),
        ({"optim": {"tables": {"lr": "1e-2"}}}, "optim.tables.lr", "YAML reads 1e-2 as text; write 0.01"),
        ({"optim": {"dense": {"name": "admw"}}}, "optim.dense.name", "expected one of adagrad, adamw, sgd"),
        ({"model": {"top": [16, "x"]}}, "model.top[1]", "is 'x'; expected an integer"),
        ({"model": {"top": 16}}, "model.top", "is 16; expected a list"),
        ({"train": 5}, "train", "is 5; expected a mapping with the keys steps"),
        ({"model": "dlrm"}, "model.name", "is missing; choose one of"),
        ({"schema": {"sparse": ["user"]}}, "schema.sparse", "expected a mapping"),
        # values that cannot be
        ({"optim": {"tables": {"name": "adam"}}}, "optim.tables.name", "on CPU use rowwise_adagrad, adagrad, sgd"),
        (
            {"embeddings": {"tables": {"user": {"sharding": "column_wise"}}}},
            "embeddings.tables.main_user.sharding",
            "use optim.tables.name: adagrad, or row_wise",
        ),
        ({"train": {"early_stopping": {}, "eval_every": 5}}, "train.early_stopping", "set data.validation"),
        (
            {"train": {"early_stopping": {}}, "data": {"validation": "x"}},
            "train.early_stopping",
            "set train.eval_every",
        ),
        (
            {"schema": {"sparse": {"tags": {"weights": "w"}}}, "embeddings": {"pooling": "mean"}},
            "embeddings.pooling",
            "feature 'tags' has a weight per id",
        ),
        (
            {"embeddings": {"inner_dim": 4}},
            "embeddings.inner_dim",
            "which is served with 8 columns; two layers need",
        ),
        (
            {"embeddings": {"inner_dim": 16, "tables": {"item": {"inner_dim": 4}}}},
            "embeddings.tables.item.inner_dim",
            "is 4 for table 'main_item', which is served with 8 columns; two layers need at least as many",
        ),
        (
            {"embeddings": {"inner_dim": 16, "tables": {"tags": {"sharding": "column_wise"}}}, "optim": ADAGRAD},
            "embeddings.tables.tags.sharding",
            "so no shard can project alone; use row_wise, or project: after",
        ),
        (
            {"embeddings": {"inner_dim": 16, "factor_above": -1}},
            "embeddings.factor_above",
            "is -1.0; use a number >= 0; 0 factors every table",
        ),
        (
            {"embeddings": {"inner_dim": 16, "factor_above": 30, "tables": {"user": {"inner_dim": 0}}}},
            "embeddings.inner_dim",
            "is 16, but no table gets two layers: each has at most factor_above = 30 times",
        ),
        (
            {"model": {"dim": 6, "bottom": [6]}},
            "embeddings.tables.main_user",
            "is 6 columns wide, as 3 table(s) are; FBGEMM's",
        ),
        ({"sharding": {"min_columns": 2}}, "sharding.min_columns", "is 2; FBGEMM's fused kernels need a multiple of 4"),
        ({"embeddings": {"kernel": "fused_uvm_caching"}}, "embeddings.kernel", "needs a GPU; on CPU use auto or fused"),
        ({"train": {"steps": None, "epochs": None}}, "train.steps", "would never end; set one of them"),
        ({"train": {"steps": 0}}, "train.steps", "is 0; use at least 1"),
        (
            {"schema": {"sparse": {"item": {"table": "user"}}}},
            "schema.sparse.item.num_ids",
            "is 101, but 'user' shares table 'user' and has 203; make them equal",
        ),
        (
            {"schema": {"sparse": {"item": {"table": "user", "num_ids": 203, "out_of_range": "reserved"}}}},
            "schema.sparse.item",
            "has a reserved row, but 'user' shares table 'user' and has none; declare `reserved` on both",
        ),
        (  # as many rows, but a stray id 202 of the item would train the row that is reserved for users
            {"schema": {"sparse": {"item": {"table": "user", "num_ids": 204}, "user": {"on_null": "reserved"}}}},
            "schema.sparse.item.num_ids",
            "is 204, but 'user' shares table 'user' and has 203; make them equal",
        ),
        (
            {"schema": {"labels": {"click": {"on_null": "fill", "fill": 0.5}}}},
            "schema.labels.click.fill",
            "is 0.5; a binary label is 0 or 1",
        ),
        (
            {"schema": {"weight": {"column": "w", "on_null": "fill", "fill": -1}}},
            "schema.weight.fill",
            "is -1.0; a weight is a finite number >= 0",
        ),
        *(
            ({"schema": {"dense": {"price": {key: value}}}}, f"schema.dense.price.{key}", f"is {value}; {words}")
            for key, value, words in (
                ("fill", float("inf"), "it stands for nulls and for absent items; give a finite number"),
                ("fill", -1e39, "it stands for nulls and for absent items; give a finite number"),
                ("mean", float("nan"), "it is taken off dense values; give a finite number that float32 can hold"),
                ("std", 1e-50, "dense values are divided by it; give a number > 0 that float32 can hold"),
            )
        ),
        ({"schema": {"dense": {"click": {}}}}, "schema.dense.click", "is also a label"),
        ({"schema": {"dense": {"user": {}}}}, "schema.dense.user", "both dense and sparse"),
        ({"schema": {"sparse": {"a@b": {"num_ids": 3}}}}, "schema.sparse.a@b", "one of @ # ."),
        ({"schema": {"labels": {"click": {"kind": "real"}}}}, "objective.name", "kind: real"),
        ({"schema": {"sparse": {"user": {"weights": "w"}}}}, "schema.sparse.user.weights", "set multi: true"),
        ({"schema": {"dense": {"d0": {"std": 0}}}}, "schema.dense.d0.std", "give a number > 0"),
        ({"schema": {"groups": {"g": {"column": "d0", "scale": -1.0}}}}, "schema.groups.g.scale", "use a number > 0"),
        (
            {"schema": {"groups": {"domain": {"column": "domain", "out_of_range": "reserved"}}}},
            "schema.groups.domain.out_of_range",
            "is reserved, which needs to know the valid values; set num_ids",
        ),
        (
            {"schema": {"groups": {"domain": {"column": "domain", "num_ids": 3, "on_null": "fill"}}}},
            "schema.groups.domain.fill",
            "is -1; values would be read as one outside 0..2",
        ),
        (
            {"schema": {"groups": {"domain": {"column": "domain", "num_ids": 0}}}},
            "schema.groups.domain.num_ids",
            "is 0",
        ),
        ({"report": {"weights": {"every": 0}}}, "report.weights.every", "use a number of steps >= 1"),
        ({"report": {"weights": {"near_zero": 0.0}}}, "report.weights.near_zero", "use a number > 0"),
        ({"objective": {"name": "bce", "label_weights": {"x": 1}}}, "objective.label_weights.x", "known: click"),
        ({"metrics": {"by": ["country"]}}, "metrics.by", "'country', which is no group of the schema; known: row"),
        ({"optim": {"schedule": {"decay": "cosine"}}}, "optim.schedule.decay_steps", "over how many steps"),
        ({"optim": {"clip_norm": 0}}, "optim.clip_norm", "use a norm > 0"),
        ({"optim": {"dense": {"lr": -1}}}, "optim.dense.lr", "a finite number >= 0"),
        ({"checkpoint": {"every": 0}}, "checkpoint.every", "is 0"),
        ({"checkpoint": {"keep": 0}}, "checkpoint.keep", "is 0"),
        ({"run": {"seed": -1}}, "run.seed", "use a number >= 0"),
        ({"data": {"batch_size": 0}}, "data.batch_size", "use at least 1"),
        ({"data": {"test": "s3://key:pass@bucket/test"}}, "data.test", "is a URI with a secret in it"),
        ({"data": {"synthetic": {"rows": 0}}}, "data.synthetic.rows", "use at least 1"),
        ({"report": {"every": 0}}, "report.every", "at least 1"),
        ({"sharding": {"host_memory_gb": 0}}, "sharding.host_memory_gb", "use a number > 0"),
        ({"model": {"dropout": 1.5}}, "model.dropout", "1.5"),
    ],
)
def test_one_thing_wrong_is_the_only_complaint(tmp_path, sections, key, text):
    found = _complaints(_base(tmp_path, **sections))
    assert list(found) == [key]
    assert text in found[key]


@pytest.mark.parametrize(
    "gone", [("data", "train"), ("data", "batch_size"), ("schema", "labels"), ("schema", "sparse")]
)
def test_a_missing_setting_is_named(tmp_path, gone):
    config = _base(tmp_path)
    del config[gone[0]][gone[1]]
    found = _complaints(config)
    assert list(found) == [".".join(gone)]
    assert "is missing; expected" in found[".".join(gone)]


def test_missing_sections_are_named_together():
    assert set(_complaints({})) == {"schema", "data", "model.name"} or set(_complaints({})) == {
        "schema",
        "data",
        "model",
    }


def test_everything_wrong_is_reported_together(tmp_path):
    """Unknown keys, types, values of their own, and combinations over sections, in one message."""
    config = _base(
        tmp_path,
        trian={"steps": 5},
        data={"batch_size": 0, "synthetic": {"rows": 0}},
        train={"steps": None, "epochs": None, "early_stopping": {}},
        optim={"tables": {"name": "adam"}, "dense": {"lr": "1e-3"}},
        embeddings={"kernel": "fused_uvm", "tables": {"usr": {}}},
        metrics={"by": ["country"]},
        model={"top": "wide"},
        run={"seed": -1},
        checkpoint={"keep": 0},
    )
    found = _complaints(config)
    expected = {"trian", "data.batch_size", "data.synthetic.rows", "train.steps", "train.early_stopping"}
    expected |= {"optim.dense.lr", "metrics.by", "model.top", "run.seed", "checkpoint.keep"}
    assert set(found) == expected
    # a section in which a key or a type is wrong has no values to check: mended, the rest of it comes
    del config["optim"]["dense"], config["model"]["top"]
    rest = {"optim.tables.name", "embeddings.kernel", "embeddings.tables.usr"}
    assert set(_complaints(config)) == expected - {"optim.dense.lr", "model.top"} | rest


def _write(path: Path, content: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


def test_bases_lie_under_the_file_that_names_them(tmp_path):
    _write(tmp_path / "schemas" / "a.yaml", _base(tmp_path, run={"seed": 1}, train={"steps": 1}))
    _write(tmp_path / "mid.yaml", {"base": "schemas/a.yaml", "run": {"seed": 2}, "train": {"steps": 2}})
    _write(tmp_path / "over.yaml", {"data": {"batch_size": 99}, "train": {"steps": 5}})
    path = _write(tmp_path / "sub" / "top.yaml", {"base": ["../mid.yaml", "../over.yaml"], "run": {"seed": 3}})
    config = load(path, ["data.batch_size=7"])
    assert (config.run.seed, config.train.steps, config.data.batch_size) == (3, 5, 7)
    assert config.model.dim == 8


def test_the_folder_of_a_run_is_no_config_but_holds_one(tmp_path):
    with pytest.raises(ConfigError, match="is a folder, and a config is a file; it has none in it"):
        load(str(tmp_path))
    _write(tmp_path / "one.yaml", {"base": "."})
    text = f"{tmp_path}, on which {tmp_path}/one.yaml builds: is a folder, and a config is a file; in it: one.yaml"
    with pytest.raises(ConfigError, match=re.escape(text)):
        load(str(tmp_path / "one.yaml"))
    _write(tmp_path / "config.yaml", {})
    with pytest.raises(ConfigError, match=re.escape(f"did you mean {tmp_path}/config.yaml?")):
        load(str(tmp_path))


@pytest.mark.parametrize("path", ["a.yaml", "b.yaml"])
def test_a_circle_of_bases_is_named(tmp_path, path):
    _write(tmp_path / "a.yaml", {"base": "b.yaml"})
    _write(tmp_path / "b.yaml", {"base": path})
    with pytest.raises(ConfigError, match=f"{path} leads back to itself"):
        load(str(tmp_path / "a.yaml"))


def test_a_diamond_of_bases_is_no_circle(tmp_path):
    _write(tmp_path / "root.yaml", _base(tmp_path))
    _write(tmp_path / "left.yaml", {"base": "root.yaml", "train": {"steps": 3}})
    _write(tmp_path / "right.yaml", {"base": "root.yaml", "run": {"seed": 4}})
    config = load(_write(tmp_path / "top.yaml", {"base": ["left.yaml", "right.yaml"]}))
    assert (config.run.seed, config.train.steps) == (4, 3)


def test_overrides_have_the_types_of_yaml_and_reach_any_depth(tmp_path):
    path = _write(tmp_path / "c.yaml", _base(tmp_path))
    overrides = [
        "train.steps=12",
        "train.epochs=null",
        "optim.tables.lr=0.5",
        "data.shuffle=false",
        "data.validation=some/*.parquet",
        "model.top=[4,5]",
        "schema.sparse.user.out_of_range=hash",
        "embeddings.tables.user.sharding=row_wise",
        "run.dir=runs/a=b",
    ]
    config = load(path, overrides)
    assert (config.train.steps, config.train.epochs, config.optim.tables.lr) == (12, None, 0.5)
    assert (config.data.shuffle, config.data.validation, config.model.top) == (False, "some/*.parquet", [4, 5])
    assert config.schema.sparse["user"].out_of_range == "hash"
    assert config.embeddings.tables["user"].sharding == "row_wise"
    assert config.run.dir == "runs/a=b"


def test_a_whole_number_may_be_written_with_an_exponent(tmp_path):
    path = _write(tmp_path / "c.yaml", _base(tmp_path))
    assert load(path, ["train.steps=1e3"]).train.steps == 1000
    with pytest.raises(ConfigError, match=r"train\.steps: is 1\.5; expected an integer"):
        load(path, ["train.steps=1.5"])
    with pytest.raises(ConfigError, match=r"run\.dir: is None; expected text"):
        load(path, ["run.dir="])


@pytest.mark.parametrize("bad", ["train.steps", "--train.steps=5", "-x=1"])
def test_what_is_no_override_is_named(tmp_path, bad):
    path = _write(tmp_path / "c.yaml", _base(tmp_path))
    with pytest.raises(ConfigError, match="is not an override; write key=value") as error:
        load(path, [bad, "run.seed=3"])
    assert [c.key for c in error.value.complaints] == [bad]


def test_a_misspelt_override_is_an_unknown_key(tmp_path):
    path = _write(tmp_path / "c.yaml", _base(tmp_path))
    with pytest.raises(ConfigError, match=r"train.stepps: is not a known key; did you mean 'steps'\?"):
        load(path, ["train.stepps=3"])


def test_a_base_that_is_not_there_is_named_with_who_builds_on_it(tmp_path):
    (tmp_path / "cards").mkdir()
    card = _write(tmp_path / "cards" / "c.yaml", {"base": "../data/schema.yaml"})
    text = rf"{tmp_path}/data/schema.yaml: does not exist, and {card} builds on it; make it first"
    with pytest.raises(ConfigError, match=text):
        load(card)


def test_interpolations_are_resolved_and_a_broken_one_is_named(tmp_path):
    path = _write(tmp_path / "c.yaml", _base(tmp_path, data={"validation": "${data.train}"}))
    assert load(path).data.validation == "unused"
    with pytest.raises(ConfigError, match="nowhere"):
        load(path, ["data.test=${data.nowhere}"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("a: [1", "is not valid YAML"),
        ("a: 1\na: 2\n", "is not valid YAML"),
        ("- a\n- b\n", "is not a mapping"),
        ("", "the config has"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path, content, message):
    path = tmp_path / "c.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        load(str(path))
    assert content == "" or str(path) in str(error.value)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"name": "dcn"}, "objective": {"name": "bce", "label_weights": {"click": 2.0}}},
        {
            "train": {"early_stopping": {"metric": "auc"}, "eval_every": 5},
            "data": {"validation": "v", "synthetic": {"rows": 10}},
            "schema": {"weight": {"column": "w"}, "sparse": {"user": {"out_of_range": "reserved"}}},
            "embeddings": {"tables": {"main_user": {"sharding": "row_wise"}}},
        },
    ],
)
def test_the_saved_config_loads_as_the_same_config(tmp_path, sections):
    config = _base(tmp_path)
    if "model" in sections:
        config.pop("model")
    config = from_mapping(merged(config, sections))
    assert load(_write(tmp_path / "config.yaml", to_yaml(config))) == config


CARDS = sorted((ROOT / "configs").rglob("*.yaml"))
# those of data sets that are prepared first build on what that leaves: tests/test_prepare.py trains them
COMPLETE = [p for p in CARDS if p.parent.name not in ("schemas", *prepare.names())]


@pytest.mark.parametrize("path", COMPLETE, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_card_of_the_repository_is_good(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load(str(path), ["run.device=cpu", f"run.dir={tmp_path}/run"])
    assert load(_write(tmp_path / "config.yaml", to_yaml(config))) == config


@pytest.mark.parametrize(
    "path", [p for p in CARDS if p.parent.name == "schemas"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_schema_of_the_repository_is_good(path, tmp_path):
    card = _write(tmp_path / "c.yaml", {"base": str(path), "model": {"name": "dcn"}})
    # a schema says nothing of paths and batches; a card that uses it does
    config = load(card, ["run.device=cpu", f"run.dir={tmp_path}/run", "data.train=x", "data.batch_size=8"])
    assert config.schema.sparse


def test_every_model_has_a_smoke_card():
    cards = [p for p in CARDS if p.parent.name == "smoke"]
    models = {read(str(p))["model"]["name"] for p in cards}
    assert models == set(choice("models").names())


def test_a_glob_is_a_good_override(tmp_path):
    card = _write(tmp_path / "c.yaml", values("x", tmp_path / "run"))
    assert load(card, ["data.train=*.parquet", "train.steps=7"]).data.train == "*.parquet"


def test_a_list_for_a_mapping_and_keys_that_are_no_text_are_complaints(tmp_path):
    card = _write(tmp_path / "c.yaml", values("x", tmp_path / "run"))
    with pytest.raises(ConfigError, match="does not fit what it overrides"):
        load(card, ["schema.sparse=[user]"])
    numbers = merged(values("x", tmp_path / "run"), {"schema": {"sparse": {0: {"num_ids": 2}}}})
    with pytest.raises(ConfigError, match=r"schema\.sparse\.0: is the int 0 and not text; write it in quotes"):
        from_mapping(numbers)
