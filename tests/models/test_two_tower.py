"""The two towers: what they compute and declare, and what their settings refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_rec.config import from_mapping
from dist_rec.data.batch import Batch
from dist_rec.data.schema import Schema
from dist_rec.models.two_tower import Config
from dist_rec.settings import ConfigError, parse
from tests import catalogues
from tests.runs import merged

B, D = 5, 4
QUERY, ITEM = ("user", "history", "history_brand"), ("item", "tags", "brand")


def make_schema(**changes: Any) -> Schema:
    return parse(Schema, merged(catalogues.schema(), changes), [])


def inputs(config: Config, schema: Schema) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    sets = config.table_sets(schema)
    return torch.randn(B, len(schema.dense)), {s.name: torch.randn(B, len(s.features), s.dim) for s in sets}


def test_features_fall_to_the_towers_by_what_an_item_alone_decides() -> None:
    (main,) = Config(dim=D).table_sets(make_schema())
    assert (main.name, main.features, main.dim) == ("main", QUERY + ITEM, D)
    query, item = Config(dim=D, tables="separate", query=["history"]).table_sets(make_schema())
    assert (query.features, item.features) == (("history",), ITEM)


@pytest.mark.parametrize("tables", ["shared", "separate"])
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_towers_are_mlps_over_embeddings_and_dense_columns(tables: Any, similarity: Any) -> None:
    schema = make_schema(dense={"hour": {}})
    config = Config(dim=D, layers=[6, 3], tables=tables, similarity=similarity)
    assert list(config.check(schema)) == []
    arch = config.build(schema)
    dense, rows = inputs(config, schema)
    output = arch(dense, rows, {})
    assert output.predictions.shape == (B, 0)
    assert arch.representation_dims == {"query": 3, "item": 3}
    query, item = (rows["query"], rows["item"]) if tables == "separate" else (rows["main"][:, :3], rows["main"][:, 3:])
    for tower, seen, columns in (("query", query, dense[:, 1:]), ("item", item, dense[:, :1])):
        w1, b1, w2, b2 = getattr(arch, tower).parameters()
        expected = torch.relu(torch.cat([seen.flatten(1), columns], 1) @ w1.T + b1) @ w2.T + b2
        if similarity == "cosine":
            expected = expected / expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(output.representations[tower], expected)


def test_a_view_is_encoded_by_the_item_tower() -> None:
    schema = make_schema()
    for config, name in ((Config(dim=D), "main#v"), (Config(dim=D, tables="separate"), "item#v")):
        arch = config.build(schema)
        dense, rows = inputs(config, schema)
        item = rows["item"] if "item" in rows else rows["main"][:, 3:]
        batch = Batch(dense, None, torch.zeros(B, 0), torch.ones(B), view_dense={"v": dense})  # type: ignore[arg-type]
        seen = arch.encode(batch, {**rows, name: item}, "v")
        assert torch.equal(seen, arch(dense, rows, {}).representations["item"])


@pytest.mark.parametrize(
    ("config", "key", "words"),
    [
        (Config(dim=0), "dim", "is 0"),
        (Config(layers=[]), "layers", "is empty"),
        (Config(dropout=1.0), "dropout", "is 1.0"),
        (Config(query=["tags"]), "query", "describes the item"),
        (Config(item=["history_brand"]), "item", "not known from the item alone"),
        (Config(query=["usr"]), "query", "no feature; known: user"),
        (Config(query=[]), "query", "no sparse feature"),
        (Config(item=["price"]), "item", "no sparse feature"),
    ],
)
def test_bad_settings_are_named(config: Config, key: str, words: str) -> None:
    found = {c.key: c.text for c in config.check(make_schema())}
    assert words in found[key]


def test_labels_and_no_item_table_are_refused(tmp_path: Any) -> None:
    (complaint,) = Config().check(make_schema(labels={"click": None}))
    assert complaint.key == "name" and "weight 0" in complaint.text
    values = catalogues.values("x", tmp_path)
    values["schema"] = {"labels": {}, "sparse": {"user": {"num_ids": 3}}}
    values["metrics"] = {}
    with pytest.raises(ConfigError) as error:
        from_mapping(values)
    keys = {c.key for c in error.value.complaints}
    assert {"model.name", "objective.name", "schema.items"} <= keys
    values = catalogues.values("x", tmp_path)
    del values["data"]["items"]
    with pytest.raises(ConfigError, match=r"data\.items: is missing"):
        from_mapping(values)


def test_early_stopping_knows_the_metrics_of_retrieval(tmp_path: Any) -> None:
    rule = {"train": {"eval_every": 5, "early_stopping": {"metric": "ne"}}}
    with pytest.raises(ConfigError, match=r"is 'ne'; choose one of recall@5, map@5, ndcg@5, recall@20"):
        from_mapping(catalogues.values("x", tmp_path, **rule))


def test_unlabelled_data_and_a_loss_of_labels_do_not_go_together(tmp_path: Any) -> None:
    values = catalogues.values("x", tmp_path)
    values["model"], values["objective"] = {"name": "dlrm"}, {"name": "bce"}
    with pytest.raises(ConfigError, match=r"objective\.name: is 'bce', but schema\.labels is empty"):
        from_mapping(values)
