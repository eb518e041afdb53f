"""Export and predict of two towers: the lists that a lone process answers with are those of the trained model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dist_rec import cli, export
from dist_rec.config import from_mapping
from dist_rec.job import JobData, restore
from dist_rec.predict import load_part
from dist_rec.serving import retrieval
from dist_rec.serving.tensor_file import read
from dist_rec.training.checkpoint import find
from dist_rec.training.evaluation import forward, predict
from dist_rec.training.stored import StoredModel
from tests import catalogues
from tests.catalogues import BRANDS, CORRELATION, ITEMS
from tests.ranks import run_ranks
from tests.runs import merged, train_all
from tests.sharded import runtime

SSL = {"auxiliary": {"contrastive": {"alpha": 0.5, "correlation": CORRELATION}}}
CASES: dict[str, dict[str, Any]] = {
    "shared": SSL,
    "separate": merged(SSL, {"model": {"tables": "separate"}, "objective": {"log_q": True}}),
    "mlet": merged(SSL, {"embeddings": {"inner_dim": 12, "factor_above": 2.0}}),
    "item_to_item": {
        "schema": {
            "sparse": {
                "source": {"num_ids": ITEMS, "table": "items"},
                "source_brand": {"num_ids": BRANDS, "join": "source", "column": "brand", "table": "brands"},
            },
            "groups": {"source": {"column": "source"}},
        },
        "model": {"query": ["source", "source_brand"]},
        "metrics": {"retrieval": {"query": "source"}},
    },
}
QUERIES = {name: {"user", "items", "brands"} for name in CASES} | {"item_to_item": {"items", "brands"}}
"""The tables that the query tower reads."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return catalogues.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Runs of two ranks, each with an export without an index."""
    folder = tmp_path_factory.mktemp("runs")
    common = {"train": {"steps": 20}, "optim": {"tables": {"lr": 0.3}}, "export": {"index": "none"}}
    runs = {name: catalogues.values(data, folder / name, **merged(common, case)) for name, case in CASES.items()}
    run_ranks(train_all, 2, list(runs.values()))
    for name in runs:
        cli.main(["export", str(folder / name / "config.yaml")])
    return runs


def _folder(run: dict[str, Any]) -> Path:
    return Path(run["run"]["dir"])


def _vectors(rank: int, world_size: int, runs: list[dict[str, Any]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the trained models make of every item and of every row of test."""
    results = []
    for run in runs:
        config, here = from_mapping(run), runtime(rank, world_size)
        model, data = restore(config, here)[1:3]
        task = data.task("test")
        batches, count = task.batches(here)
        items = [o.representations["item"][o.weights > 0] for o in forward(model, batches, count, here)]
        queries = [
            o.representations["query"][o.weights > 0]
            for o in predict(model, JobData(config, here, splits=("test",)).once("test"), here)
        ]
        results.append((torch.cat(items), torch.cat(queries)))
    return results


def test_vectors_and_lists_are_those_of_the_trained_model(data, trained, tmp_path):
    rows = pq.read_table(data / "test").select(["row", "user", "history", "source"])  # no item: that is asked
    (tmp_path / "queries").mkdir()
    pq.write_table(rows.slice(0, 50), tmp_path / "queries" / "a.parquet", row_group_size=20)
    pq.write_table(rows.slice(50), tmp_path / "queries" / "b.parquet")
    (expected,) = run_ranks(_vectors, 1, list(trained.values()))
    for (name, run), (items, queries) in zip(trained.items(), expected, strict=True):
        folder, out = _folder(run), tmp_path / f"{name}.parquet"
        exported = pq.read_table(folder / "export" / "items.parquet")
        assert exported["id"].to_pylist() == pq.read_table(data / "items")["id"].to_pylist()
        vectors = torch.tensor(np.stack(exported["vector"].to_numpy()))
        tolerance = 1e-5 if name == "mlet" else 1e-6
        torch.testing.assert_close(vectors, items, rtol=0, atol=tolerance)
        cli.main(["predict", str(folder / "export"), str(tmp_path / "queries"), str(out), "keep=[row]", "k=7"])
        found = pq.read_table(out)
        assert found.column_names == ["row", "items", "scores"]
        assert found["row"].to_pylist() == rows["row"].to_pylist()
        scores, order = (queries @ items.T).topk(7, dim=1)
        torch.testing.assert_close(torch.tensor(found["scores"].to_pylist()), scores, rtol=0, atol=tolerance)
        ids = np.array(exported["id"].to_pylist())[order.numpy()]
        agree = (np.array(found["items"].to_pylist()) == ids).mean()
        assert agree > (0.98 if name == "mlet" else 0.999), agree


def test_each_tower_has_the_tables_and_layers_that_it_needs(trained):
    for name, run in trained.items():
        folder = _folder(run) / "export"
        tensors = {tower: read(folder / tower / "model.safetensors") for tower in ("query", "item")}
        for tower, found in tensors.items():
            assert any(n.startswith(f"dense.arch.{tower}.") for n in found)
            other = {"query": "item", "item": "query"}[tower]
            assert not any(n.startswith(f"dense.arch.{other}.") or "auxiliaries" in n for n in found)
        tables = {t: {n.split(".")[-2] for n in found if ".embedding_bags." in n} for t, found in tensors.items()}
        prefix = ("main_", "main_") if name != "separate" else ("query_", "item_")
        assert tables["query"] == {f"{prefix[0]}{t}" for t in QUERIES[name]}
        assert tables["item"] == {f"{prefix[1]}{t}" for t in ("items", "tags", "brands")}
        with StoredModel(find(_folder(run) / "checkpoints")[-1].path) as stored:
            served = {n for n in stored.tensors if not n.startswith(("dense.objective", "embeddings.projections"))}
        assert served == set(tensors["query"]) | set(tensors["item"])


def test_items_are_left_out_and_short_lists_are_short(data, trained, tmp_path):
    export, out = _folder(trained["shared"]) / "export", tmp_path / "out.parquet"
    query = ["predict", str(export), f"{data}/test", str(out), "overwrite=true", "keep=[history]"]
    cli.main([*query, "k=7", "exclude=[history]"])
    found = pq.read_table(out)
    assert all(
        not set(i) & set(h) for i, h in zip(found["items"].to_pylist(), found["history"].to_pylist(), strict=True)
    )
    cli.main([*query, "k=7"])
    plain = pq.read_table(out)
    assert plain["items"].to_pylist() != found["items"].to_pylist()
    cli.main([*query, "k=200", "exclude=[history]"])
    whole = len(catalogues.items())
    for items, history in zip(*(pq.read_table(out)[c].to_pylist() for c in ("items", "history")), strict=True):
        assert len(items) == len(set(items)) == whole - len(set(history))


def test_items_are_queries_that_need_nothing_else_and_are_left_out_of_their_own_lists(data, trained, tmp_path):
    export, out = _folder(trained["item_to_item"]) / "export", tmp_path / "out.parquet"
    pq.write_table(pq.read_table(data / "test").select(["source"]), tmp_path / "sources.parquet")
    whole = len(catalogues.items())
    query = ["predict", str(export), str(tmp_path / "sources.parquet"), str(out), "keep=[source]", f"k={whole}"]
    cli.main([*query, "exclude=[source]"])
    found = pq.read_table(out)
    for items, source in zip(found["items"].to_pylist(), found["source"].to_pylist(), strict=True):
        assert len(set(items)) == len(items) == whole - 1 and source not in items


def test_an_index_is_built_searched_and_compared(data, trained, tmp_path, capsys):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    run, export = trained["shared"], tmp_path / "export"
    config = str(_folder(run) / "config.yaml")
    query = [str(export), f"{data}/test", str(tmp_path / "out.parquet"), "overwrite=true", "k=7", "exclude=[history]"]
    recalls = {}
    for factory in ("auto", "HNSW8", "IVF8,Flat"):
        cli.main(["export", config, f"export.path={export}", f"export.index={factory}", "export.probes=1"])
        assert "index_recall@10" in capsys.readouterr().out
        report = json.loads((export / "report.json").read_text())
        assert (report["index"], report["items"]) == ("Flat" if factory == "auto" else factory, 95)
        assert report["queries"] == "90 rows of validation"
        recalls[factory] = report["index_recall@10"]
        if factory == "auto":
            lists = []
            for search in ("exact", "index"):
                cli.main(["predict", *query, f"search={search}"])
                lists.append(pq.read_table(tmp_path / "out.parquet"))
            assert lists[0]["items"].to_pylist() == lists[1]["items"].to_pylist()
    assert recalls["auto"] == 1
    assert 0.1 < recalls["IVF8,Flat"] < 1, "one list of eight cannot hold everything"


def test_recall_of_a_list_that_misses_half_is_a_half(tmp_path, monkeypatch):
    class Index:
        def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            return np.zeros((2, 4)), np.array([[10, 11, 98, 99], [99, 12, 98, 13]])

    class Library:
        def read_index(self, path: str) -> Index:
            return Index()

    monkeypatch.setattr(retrieval, "faiss", Library)
    path = tmp_path / "items.parquet"
    values = pa.FixedSizeListArray.from_arrays(pa.array(torch.eye(6).flatten().numpy()), 6)
    # in row groups that are shorter than the list
    pq.write_table(pa.table({"id": np.arange(10, 16), "vector": values}), path, row_group_size=2)
    queries = torch.tensor([[9, 8, 7, 6, 0, 0.0], [9, 8, 7, 6, 0, 0]])
    assert retrieval.index_recall(tmp_path, path, queries, 4) == 0.5


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("Nonsense", "is 'Nonsense', which FAISS does not understand"),
        ("IVF1024,Flat", "is 'IVF1024,Flat', which has 1024 lists for 95 items; use fewer lists"),
    ],
)
def test_what_is_wrong_with_an_index_is_said_before_anything_is_written(trained, tmp_path, monkeypatch, index, words):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    config = str(_folder(trained["shared"]) / "config.yaml")
    monkeypatch.delattr(export, "_write")
    with pytest.raises(SystemExit, match=words):
        cli.main(["export", config, f"export.path={tmp_path}/export", f"export.index={index}"])
    assert not list(tmp_path.iterdir())


def test_an_index_that_cannot_be_trained_on_so_few_items_names_them(trained, tmp_path):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    config = str(_folder(trained["shared"]) / "config.yaml")
    for index, words in (
        ("IVF8,PQ4", "with 8 lists cannot be trained on 95 items"),
        ("PQ4", "which cannot be trained"),
    ):
        with pytest.raises(SystemExit, match=words):
            cli.main(["export", config, f"export.path={tmp_path}/export", f"export.index={index}"])


def test_auto_is_an_inverted_file_where_there_are_many_items(trained, tmp_path, monkeypatch):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    monkeypatch.setattr(retrieval, "_EXACT_UP_TO", 94)
    config, folder = str(_folder(trained["shared"]) / "config.yaml"), tmp_path / "export"
    recalls = {}
    for probes in (1, 1000):
        cli.main(["export", config, f"export.path={folder}", "export.index=auto", f"export.probes={probes}"])
        report = json.loads((folder / "report.json").read_text())
        assert report["index"] == "IVF32,Flat"  # 4 * sqrt(95) is 39
        recalls[probes] = report["index_recall@10"]
    assert recalls[1] < recalls[1000] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["exclude=[tags]"],
            "exclude: names 'tags', which is no feature of the query tower with as many ids as there are items",
        ),
        (["exclude=[user]"], "exclude: names 'user', which is no feature of the query tower .* known: history$"),
        (["search=index"], r"has no items\.faiss; export the model again"),
        (["k=0"], "k: is 0"),
        (["keep=[items]"], "keep: names 'items', which is a column of scores"),
        (["items=nowhere.parquet"], r"nowhere\.parquet: there is no such file"),
    ],
)
def test_what_cannot_be_answered_is_named(data, trained, tmp_path, arguments, words):
    export = str(_folder(trained["shared"]) / "export")
    with pytest.raises(SystemExit, match=words):
        cli.main(["predict", export, f"{data}/test", str(tmp_path / "out.parquet"), *arguments])
    assert not (tmp_path / "out.parquet").exists()


def test_a_ranking_model_with_joined_columns_scores_them_too(data, tmp_path):
    """The item table is a source of features for any model."""
    rows = catalogues.interactions(300)
    clicks = np.random.default_rng(0).integers(0, 2, 300).astype("float32")
    pq.write_table(rows.append_column("click", pa.array(clicks)), tmp_path / "train.parquet")
    run = catalogues.values(data, tmp_path / "run", data={"train": str(tmp_path / "train.parquet")}, train={"steps": 5})
    run["schema"]["labels"], run["objective"], run["metrics"] = {"click": None}, {"name": "bce"}, {}
    run["model"] = {"name": "dlrm", "dim": 8, "bottom": [8], "top": [8]}
    run["data"] = {**run["data"], "test": str(tmp_path / "train.parquet"), "validation": None}
    run_ranks(train_all, 1, [run])
    out = tmp_path / "evaluated.parquet"
    run_ranks(_evaluate, 1, merged(run, {"evaluate": {"predictions": str(out)}}))
    cli.main(["export", str(tmp_path / "run" / "config.yaml")])
    export = str(tmp_path / "run" / "export")
    cli.main(["predict", export, str(tmp_path / "train.parquet"), str(tmp_path / "out.parquet")])
    predicted = pq.read_table(tmp_path / "out.parquet")["logit_click"].to_numpy()
    assert np.array_equal(predicted, pq.read_table(out)["logit_click"].to_numpy())
    assert predicted.std() > 1e-3
    assert load_part(Path(export)).reads[-1] == "price"


def _evaluate(rank: int, world_size: int, run: dict[str, Any]) -> None:
    from dist_rec import evaluate

    evaluate.run(from_mapping(run))
