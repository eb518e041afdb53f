"""`dist-rec prepare` through the command: bad raw files and their messages, what it leaves, and training on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_rec import cli
from dist_rec.config import from_mapping, load, read
from dist_rec.prepare import names
from tests.data.raw import files
from tests.ranks import run_ranks
from tests.runs import train_all

WRITERS: dict[str, Callable[[Path], Any]] = {
    "criteo": lambda raw: files.criteo(raw / "train.txt", 700),
    "avazu": lambda raw: files.avazu(raw / "train.gz", 400),
    "movielens": lambda raw: files.movielens_1m(raw, 500),
    "kuairand": lambda raw: files.kuairand(raw, 900),
    "aliccp": lambda raw: files.aliccp(raw, 500),
}


def error_of(*arguments: str) -> str:
    """What the command says when it fails."""
    with pytest.raises(SystemExit) as end:
        cli.main(["prepare", *arguments])
    assert isinstance(end.value.code, str), "it did not fail"
    return end.value.code


def cut(path: Path, keep: float = 0.5) -> None:
    """What a broken download leaves."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def edit(path: Path, line: int, text: str) -> None:
    """Puts `text` in the place of a line, counted from 1."""
    lines = path.read_text("latin-1").split("\n")
    lines[line - 1] = text
    path.write_text("\n".join(lines), "latin-1")


BAD: list[tuple[str, Callable[[Path], Any], str]] = [
    ("criteo", lambda raw: (raw / "train.txt").unlink(), "has no train.txt or day_0 (plain or .gz) in it, but nothing"),
    ("criteo", lambda raw: (raw / "train.txt").write_text(""), "train.txt: is empty (0 bytes)"),
    ("criteo", lambda raw: cut(raw / "train.txt", 0.9), "fields, found"),
    ("criteo", lambda raw: edit(raw / "train.txt", 9, "1\t2"), "line 9: expected 40 fields, found 2: '1\\t2'"),
    ("criteo", lambda raw: edit(raw / "train.txt", 9, "2" + "\t" * 39), "line 9: column 'label' is 2; expected 0 or 1"),
    ("criteo", lambda raw: edit(raw / "train.txt", 9, "0" + "\t" * 38 + "\tgh"), "line 9: column 'c26' is 'gh'"),
    ("criteo", lambda raw: (raw / "train.txt").rename(raw / "day_3"), "has day_3 alone"),
    ("avazu", lambda raw: cut(raw / "train.gz"), "(Truncated compressed stream): it is cut short"),
    ("avazu", lambda raw: cut(raw / "train.gz", 0.0), "train.gz: is empty"),
    ("avazu", lambda raw: files.avazu(raw / "train.gz", 50, days=2), "train.gz: has rows of 2 day(s)"),
    ("avazu", lambda raw: files.table(raw / "train.gz", [{"id": 1, "click": 0}]), "hour not found in 'id,click'"),
    ("avazu", lambda raw: files.table(raw / "train.gz", [{"id": 1, "click": 0, "hour": 14102199}]),
     "line 2: column 'hour' is 14102199; expected YYMMDDHH"),
    ("avazu", lambda raw: files.table(raw / "train.gz", [{"id": 1, "click": 0, "hour": 14093123}]),
     "line 2: column 'hour' is 14093123; expected YYMMDDHH"),
    ("avazu", lambda raw: files.table(raw / "train.gz", [{"id": 1, "click": 0, "hour": 14100000}]),
     "line 2: column 'hour' is 14100000; expected YYMMDDHH"),
    ("movielens", lambda raw: (raw / "movies.dat").unlink(), "has no movies.dat"),
    ("movielens", lambda raw: (raw / "ratings.dat").unlink(), "has no u.data or ratings.dat or ratings.csv"),
    ("movielens", lambda raw: edit(raw / "ratings.dat", 7, "1::2::9::978300760"), "line 7: column 'rating' is 9.0"),
    ("movielens", lambda raw: edit(raw / "ratings.dat", 7, "1::2::9"), "line 7: expected 7 fields, found 5"),
    ("movielens", lambda raw: edit(raw / "movies.dat", 3, "3::No genres (1995)"), "line 3: column 'line' is '3::No"),
    ("movielens", lambda raw: edit(raw / "users.dat", 2, "1::M::30::x::0"), "line 2: user 1 is there for a second"),
    ("kuairand", lambda raw: (raw / "data" / "user_features_1k.csv").unlink(), "has no user_features_1k.csv"),
    ("kuairand", lambda raw: edit(raw / "data" / "log_standard_4_22_to_5_08_1k.csv", 1, "user_id,video_id"),
     "log_standard_4_22_to_5_08_1k.csv: line 1: expected a header with the columns date, tab"),
    ("kuairand", lambda raw: cut(raw / "data" / "log_standard_4_22_to_5_08_1k.csv"), "expected 13 fields, found"),
    ("kuairand", lambda raw: cut(raw / "data" / "video_features_basic_1k.csv"), "video_features_basic_1k.csv: line"),
    ("aliccp", lambda raw: (raw / "common_features_test.csv").unlink(), "has no common_features_test.csv"),
    ("aliccp", lambda raw: edit(raw / "sample_skeleton_train.csv", 5, "5,0,0,nobody,1,301\x029351665\x031.0"),
     "sample_skeleton_train.csv: line 5: column 'key' is 'nobody'; expected a key of common_features_train.csv"),
    ("aliccp", lambda raw: edit(raw / "sample_skeleton_train.csv", 5, f"5,0,0,train{0:028x},3,301\x021\x031.0"),
     "line 5: says 3 features, but has 1; is the line whole?"),
    ("aliccp", lambda raw: edit(raw / "common_features_train.csv", 5, "k,2,101\x021\x031.0\x01121\x025"),
     "common_features_train.csv: line 5: feature 121\x025 is not field"),
    ("aliccp", lambda raw: edit(raw / "common_features_test.csv", 2, f"test{0:028x},1,101\x021\x031.0"),
     "common_features_test.csv: line 2: key"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "message"), BAD, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(BAD)])
def test_bad_raw_files(tmp_path: Path, name: str, spoil: Callable[[Path], Any], message: str) -> None:
    WRITERS[name](tmp_path / "raw")
    spoil(tmp_path / "raw")
    text = error_of(name, str(tmp_path / "raw"), str(tmp_path / "out"))
    assert text.startswith(f"error: {tmp_path}/raw") and message in text
    assert [p.name for p in tmp_path.iterdir()] == ["raw"], "nothing is left behind"


def test_bad_arguments(tmp_path: Path) -> None:
    WRITERS["criteo"](tmp_path / "raw")
    raw, out = str(tmp_path / "raw"), str(tmp_path / "out")
    assert "'crito' is no data set that can be prepared; choose one of aliccp, avazu" in error_of("crito", raw, out)
    assert "--max-ids: is 'x'; expected a whole number >= 1" in error_of("criteo", raw, out, "--max-ids", "x")
    assert "out" in error_of("criteo", raw)
    assert "raw: exists already; remove it" in error_of("criteo", raw, raw)
    assert "is no folder; give the one that holds" in error_of("criteo", str(tmp_path / "none"), out)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of("criteo", raw, str(tmp_path / "file" / "out"))


def test_help_lists_the_sets_and_says_of_each_what_it_expects(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [([], "aliccp, avazu, criteo, kuairand, movielens"), (["aliccp"], "sample_skeleton_train.csv")]
    for arguments, expected in [*cases, *(([name], "Files expected in RAW") for name in ("criteo", "kuairand"))]:
        with pytest.raises(SystemExit) as end:
            cli.main(["prepare", *arguments, "--help"])
        assert end.value.code == 0
        assert expected in capsys.readouterr().out


def test_files_that_are_not_whole_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    WRITERS["criteo"](tmp_path / "raw")
    cli.main(["prepare", "criteo", str(tmp_path / "raw"), str(tmp_path / "out")])
    assert "700 rows were read, but the published files have 45,840,617: are they whole?" in caplog.text


OTHER_LABELS = {"aliccp": ["conversion"], "kuairand": ["is_like", "long_view"]}


@pytest.mark.parametrize("name", names())
def test_training_on_what_it_writes(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On all labels of the files: those that are declared, and the others in the way that the documentation says."""
    WRITERS[name](tmp_path / "raw")
    cli.main(["prepare", name, str(tmp_path / "raw"), str(tmp_path / "out")])
    assert "next: a config with `base: " in capsys.readouterr().out
    left = {p.name for p in (tmp_path / "out").iterdir()}
    assert left == {"train", "validation", "test", "schema.yaml", "counts.json"} | ({"random"} & left)
    assert ("random" in left) == (name == "kuairand")
    card = tmp_path / "cards" / "card.yaml"
    card.parent.mkdir()
    card.write_text("base: ../out/schema.yaml\nmodel: {name: dlrm, dim: 8, bottom: [16], top: [16]}\n")
    others, declared = OTHER_LABELS.get(name, []), list(load(str(card)).schema.labels)
    overrides = [f"run.dir={tmp_path / 'run'}", "run.device=cpu", "data.batch_size=32", "train.steps=3"]
    values = read(str(card), [*overrides, "report.tensorboard=false", *(f"schema.labels.{o}={{}}" for o in others)])
    config = from_mapping(values)
    assert list(config.schema.labels) == [*declared, *others]
    groups = list(config.schema.groups)
    values["metrics"] = {"grouped_auc": ["user"] * ("user" in groups), "by": ["domain"] * ("domain" in groups)}
    ((result,),) = run_ranks(train_all, 1, [values])
    assert result["step"] == 3
    rows = json.loads((tmp_path / "out" / "counts.json").read_text())["splits"]
    assert rows["train"]["rows"] >= 96
    for label in config.schema.labels:
        assert 0 < result["metrics"]["test"][f"{label}/log_loss" if others else "log_loss"] < 2
    assert set(result["data_policies"]["train"]) <= {f"{d}.null=fill" for d in config.schema.dense}


ROOT = Path(__file__).parents[1]
CARDS = sorted(path for name in names() for path in (ROOT / "configs" / name).glob("*.yaml"))


@pytest.mark.parametrize("card", CARDS, ids=lambda p: str(p.relative_to(ROOT)))
def test_cards_of_prepared_data_train(tmp_path: Path, card: Path) -> None:
    """On two ranks, from a folder like the repository in which their data were prepared as their headers say."""
    name = card.parent.name
    assert f"dist-rec prepare {name} RAW .data/{name}" in card.read_text()
    WRITERS[name](tmp_path / "raw")
    cli.main(["prepare", name, str(tmp_path / "raw"), str(tmp_path / ".data" / name)])
    copy = tmp_path / "configs" / name / card.name
    copy.parent.mkdir(parents=True)
    copy.write_text(card.read_text())
    overrides = [f"run.dir={tmp_path}/run", "run.device=cpu", "data.batch_size=32", "train.steps=2"]
    result, _ = run_ranks(train_all, 2, [read(str(copy), [*overrides, "report.tensorboard=false"])])
    assert result[0]["step"] == 2
    metrics, diagnostics = result[0]["metrics"]["test"], result[0]["diagnostics"]["test"]
    counts = json.loads((tmp_path / ".data" / name / "counts.json").read_text())
    domains = counts["splits"]["test"]["rows_by_domain"]
    assert len(domains) > 1 and {f"auc/domain={d}" for d in domains} | {"gauc/user"} <= set(metrics)
    assert {"correlation", "diversity_qjsd", "information_abundance/expert_1"} <= set(diagnostics)
