"""Two towers on one and several ranks, with and without the contrastive loss: equal to plain torch, and to themselves
after a stop."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from torchrec.optim import RowWiseAdagrad

from dist_rec import evaluate, train
from dist_rec.config import RunConfig, choice, from_mapping
from dist_rec.contract import ArchOutput
from dist_rec.data.batch import Batch
from dist_rec.data.catalogue import Catalogue
from dist_rec.data.footers import read_footers
from dist_rec.data.item_table import ItemTable
from dist_rec.data.join import ITEM, Join
from dist_rec.data.loader import Loader
from dist_rec.data.schema import Schema
from dist_rec.data.views import with_empty_views
from dist_rec.embeddings.sharding import initialise
from dist_rec.job import JobData
from dist_rec.objectives import in_batch_softmax
from dist_rec.recommender import build, distribute
from dist_rec.settings import parse
from dist_rec.training import evaluation
from dist_rec.training.checkpoint import Checkpoint, find
from dist_rec.training.trainer import GuardedPipeline
from scripts.bench.traffic import calls
from tests import catalogues
from tests.catalogues import CORRELATION
from tests.examples import share
from tests.ranks import run_ranks
from tests.runs import merged, reports, train_all
from tests.sharded import runtime, whole

STEPS, ROWS = 6, 24
SSL = {"auxiliary": {"contrastive": {"alpha": 0.7, "correlation": CORRELATION}}}
DIMENSIONS = {"masking": "rfm", "dimension_dropout": 0.3, "hidden": ["item"], "correlation": {}}
SPREAD = {"spread_out": {"weight": 0.5}}
MLET = {"embeddings": {"inner_dim": 12, "factor_above": 2.0}}
MIXED = {"user": "row_wise", "items": "table_row_wise", "tags": "data_parallel", "brands": "table_wise"}
SHARDED = {"embeddings": {"tables": {table: {"sharding": kind} for table, kind in MIXED.items()}, "pooling": "mean"}}
CASES: dict[str, dict[str, Any]] = {
    "plain": SHARDED,
    "log_q": {"objective": {"log_q": True, "half_life": 3.0, "max_logits": 50}},
    "ssl": merged(SSL, SHARDED),
    "separate": merged(SSL, {"model": {"tables": "separate", "similarity": "dot"}}),
    "dimensions": {"auxiliary": {"contrastive": DIMENSIONS, **SPREAD}},
    "spread_softmax": {"auxiliary": {"spread_out": {"form": "softmax"}}},
    "mlet": merged(merged(SSL, SHARDED), MLET),
    "rowwise_adagrad": merged(SSL, {"optim": {"tables": {"name": "rowwise_adagrad", "lr": 0.1}}}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return catalogues.write(tmp_path_factory.mktemp("data"))


def _config(data: Path, folder: Path, settings: dict[str, Any]) -> RunConfig:
    optim = {"tables": {"name": "sgd", "lr": 0.5}, "dense": {"name": "sgd", "lr": 0.1}}
    return from_mapping(catalogues.values(data, folder, **merged({"optim": optim}, settings)))


def _batches(config: RunConfig, rank: int, world_size: int) -> list[Batch]:
    """The last batches of an epoch, of which the very last has padding, shared among the ranks; with their views."""
    table = ItemTable(config.schema, read_footers(config.data.items), Path(config.data.cache))
    loader = Loader(
        config.data, config.schema.of_rows(), read_footers(config.data.train), rank=0, world_size=1, batch_size=ROWS,
        seed=0, shuffle=True, epochs=1, join=Join(config.schema, table),
    )  # fmt: skip
    batches = list(loader)[-STEPS:]
    assert (batches[-1].weights == 0).any()
    fills = [part.fill(Catalogue(config.schema, table), 3) for part in config.auxiliary.values()]
    shares = [share(batch, rank, world_size) for batch in batches]
    for fill in fills:
        shares = [fill(batch, step, rank) for step, batch in enumerate(shares)]
    return shares


def _unsharded(config: RunConfig) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, initial and final parameters of plain torch on the whole batches."""
    model, tables = build(config, table_device="cpu")
    initialise(model.state_dict(), tables, config.run.seed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rule = config.optim.tables
    kind: Any = {"sgd": torch.optim.SGD, "rowwise_adagrad": RowWiseAdagrad}[rule.name]
    extra = {"eps": rule.eps} if rule.name == "rowwise_adagrad" else {}
    dense = [p for n, p in model.named_parameters() if ".embedding_bags." not in n]
    optimizers = [kind(model.embeddings.collection.parameters(), lr=rule.lr, **extra), torch.optim.SGD(dense, lr=0.1)]
    losses = []
    for batch in _batches(config, 0, 1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss, _ = model(batch)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses, before, {name: p.detach().clone() for name, p in model.named_parameters()}


def _sharded(rank: int, world_size: int, configs: list[RunConfig]) -> list[tuple]:
    """Per config: losses of all ranks together, initial and final state; how often ids were sent to the shards."""
    results = []
    for config in configs:
        parts = distribute(config, runtime(rank, world_size))
        before = whole(parts.model.state_dict())
        pipeline = GuardedPipeline(parts.model, parts.optimizer, runtime(rank, world_size))
        batches, losses = iter(_batches(config, rank, world_size)), []
        with calls() as made:
            for _ in range(STEPS):
                loss = torch.stack(list(pipeline.progress(batches).losses.values())).sum()
                dist.all_reduce(loss)
                losses.append(loss.item() / world_size)
        inside, every = pipeline.pipelined()
        assert inside == every and inside
        sent = sum(call.name == "all_to_all_single" and not call.is_float for call in made)
        results.append((losses, before, whole(parts.model.state_dict()), sent))
    return results


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_losses_and_updates_equal_unsharded_torch(data, tmp_path, world_size):
    configs = [_config(data, tmp_path, settings) for settings in CASES.values()]
    results = run_ranks(_sharded, world_size, configs)[0]
    sent = dict(zip(CASES, (result[-1] for result in results), strict=True))
    assert sent["ssl"] == sent["plain"] >= (STEPS if world_size > 1 else 0), "the views are looked up apart"
    for name, config, (losses, before, after, _) in zip(CASES, configs, results, strict=True):
        expected_losses, expected_before, expected_after = _unsharded(config)
        assert losses == pytest.approx(expected_losses, rel=1e-6), name
        assert set(expected_before) <= set(before)
        for parameter, start in expected_before.items():
            assert torch.equal(before[parameter], start), f"{name}: initial {parameter}"
            update, expected = after[parameter] - start, expected_after[parameter] - start
            assert expected.norm() > 0, f"{name}: {parameter} did not train"
            error = (update - expected).norm() / expected.norm()
            assert error < 1e-5, f"{name} on {world_size} ranks: the update of {parameter} is off by {error:.1e}"


TERMS = {
    "softmax": ("in_batch_softmax", {"temperature": 0.1}),
    "equation_11": ("in_batch_softmax", {"temperature": 0.1, "mask_same_item": False}),
    "contrastive": ("contrastive", {"alpha": 1.0, "masking": "none", "temperature": 0.1}),
    "squared": ("spread_out", {"weight": 1.0}),
    "spread_softmax": ("spread_out", {"weight": 1.0, "form": "softmax", "temperature": 0.1}),
}


def _terms(rank: int, world_size: int) -> dict[str, tuple[float, torch.Tensor]]:
    """Each term of this rank's rows, and its gradient."""
    generator = torch.Generator().manual_seed(4)
    whole_batch = torch.randn(2, ROWS, 8, generator=generator)
    items = torch.randint(0, 15, (ROWS,), generator=generator)
    weights = torch.rand(ROWS, generator=generator)
    weights[-5:] = 0  # all on the last rank
    here = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    schema: Any = parse(Schema, catalogues.schema(), [])
    results = {}
    for name, (module, settings) in TERMS.items():
        config = choice("objectives" if module == "in_batch_softmax" else "auxiliary").load(module)(**settings)
        vectors = torch.nn.functional.normalize(whole_batch[:, here], dim=2).requires_grad_()
        batch = Batch(torch.zeros(0), None, torch.zeros(0), weights[here])  # type: ignore[arg-type]
        batch.groups = {ITEM: items[here], "contrastive#item": items[here], "spread_out#item": items[here]}
        part = config.build(schema, {"query": 8, "item": 8})
        output = ArchOutput(torch.zeros(0), {"query": vectors[0], "item": vectors[1]})
        views = {"contrastive_1": vectors[0], "contrastive_2": vectors[1], "spread_out": vectors[0]}
        (term,) = part(output, batch, lambda view, change=None, views=views: views[view]).values()
        term.backward()
        results[name] = (term.item(), vectors.grad)
    return results


def test_loss_and_gradient_of_n_ranks_are_those_of_one():
    (one,) = run_ranks(_terms, 1)
    for world_size in (2, 3):
        results = run_ranks(_terms, world_size)
        for name, (loss, gradient) in one.items():
            mean = sum(result[name][0] for result in results) / world_size
            assert mean == pytest.approx(loss, rel=1e-6), name
            found = torch.cat([result[name][1] for result in results], dim=1) / world_size
            assert (found - gradient).norm() < 1e-6 * gradient.norm(), f"{name} on {world_size} ranks"


def test_rows_of_weight_0_are_neither_positives_nor_negatives():
    generator = torch.Generator().manual_seed(5)
    vectors, items = torch.randn(2, 10, 8, generator=generator), torch.arange(10)
    part = choice("objectives").load("in_batch_softmax")(temperature=0.5, log_q=True)
    schema: Any = parse(Schema, catalogues.schema(), [])

    def loss(rows: list[int], weights: list[float]) -> float:
        batch = Batch(torch.zeros(0), None, torch.zeros(0), torch.tensor(weights))  # type: ignore[arg-type]
        batch.groups = {ITEM: items[rows]}
        output = ArchOutput(torch.zeros(0), {"query": vectors[0, rows], "item": vectors[1, rows]})
        return part.build(schema, {"query": 8, "item": 8})(output, batch, None)["in_batch_softmax"].item() * len(rows)

    some = [0, 3, 4, 7]
    weights = [2.0 if i in some else 0.0 for i in range(10)]
    assert loss(list(range(10)), weights) == pytest.approx(loss(some, [2.0] * 4), rel=1e-6)
    assert loss(list(range(10)), [1.0] * 10) > loss(some, [1.0] * 4)


def test_the_share_of_an_item_counts_rows_and_forgets():
    shares = in_batch_softmax.Shares(8, None)
    for ids in ([1, 1, 3], [1, -1, 5], [3, -1, -1]):
        shares.update(torch.tensor(ids))
    found = shares.log_share(torch.tensor([1, 3, 5, 7])).exp()
    torch.testing.assert_close(found, torch.tensor([3 / 6, 2 / 6, 1 / 6, 1 / 6]))  # 7 as if seen once
    fading = in_batch_softmax.Shares(8, half_life=1.0)
    for ids in ([1, 1, 1, 1], [3, 3, 3, 3], [3, 3, 3, 3]):
        fading.update(torch.tensor(ids))
    torch.testing.assert_close(fading.log_share(torch.tensor([1, 3])).exp(), torch.tensor([1 / 7, 6 / 7]))
    assert in_batch_softmax.Shares(8, None).log_share(torch.tensor([9])).isfinite().all()


def _train_all(rank: int, world_size: int, runs: list[dict[str, Any]]) -> None:
    for run in runs:
        train.run(from_mapping(run))


def _run(data: Path, folder: Path, steps: int, /, **sections: Any) -> dict[str, Any]:
    base = {
        "train": {"steps": steps, "epochs": None, "eval_every": 15},
        "checkpoint": {"every": 10, "keep": 100},
        "model": {"dropout": 0.2},
        "optim": {"dense": {"name": "adamw", "lr": 0.01}, "tables": {"lr": 0.1}},
        "objective": {"log_q": True, "half_life": 20.0},
    }
    return catalogues.values(data, folder, **merged(base, sections))


def _tensors(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in checkpoint.path.glob("*.distcp")}


def _looked_up(rank: int, world_size: int, configs: list[RunConfig]) -> list[tuple[set[str], set[str], set[str]]]:
    """Per config: keys of a training batch, its groups, and the auxiliaries of the model."""
    found = []
    for config in configs:
        loader = JobData(config, runtime(rank, world_size), splits=("train",)).train(None)
        batch = next(iter(loader))
        loader.close()
        found.append((set(batch.sparse.keys()), set(batch.groups), set(build(config)[0].dense.auxiliaries)))
    return found


@pytest.mark.parametrize("off", ["contrastive", "spread_out", "both"])
def test_at_a_weight_of_0_nothing_is_drawn_looked_up_or_built(data, tmp_path, off):
    weights = {"contrastive": {"alpha": 0.3, "correlation": CORRELATION}, "spread_out": {"weight": 0.3}}
    zero = {"contrastive": {"alpha": 0.0}, "spread_out": {"weight": 0.0}}
    gone = list(weights) if off == "both" else [off]
    kept = {name: part for name, part in weights.items() if name not in gone}
    both = {"auxiliary": merged(weights, {name: zero[name] for name in gone})}
    with_0, without = (_config(data, tmp_path, settings) for settings in (both, {"auxiliary": kept}))
    (found,) = run_ranks(_looked_up, 1, [with_0, without])
    assert found[0] == found[1] and found[0][2] == set(kept)
    assert with_0.views == without.views
    assert any("#" in key for key in found[0][0]) == bool(kept)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_weight_of_0_is_bit_for_bit_the_run_without(data, tmp_path, world_size):
    off = {"contrastive": {"alpha": 0.0, "correlation": CORRELATION}, "spread_out": {"weight": 0.0}}
    on = {"contrastive": {"alpha": 0.5, "correlation": CORRELATION}}
    runs = {"plain": {}, "off": off, "on": on}
    run_ranks(_train_all, world_size, [_run(data, tmp_path / n, 30, auxiliary=a, **SHARDED) for n, a in runs.items()])
    plain, without, with_it = (_tensors(find(tmp_path / name / "checkpoints")[-1]) for name in runs)
    assert plain and plain == without
    assert plain != with_it
    reported = [[r["metrics"] for r in reports(tmp_path / n, "validation")] for n in runs]
    assert reported[0] == reported[1] != reported[2]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_resumed_run_is_the_run_that_was_not_stopped_and_draws_the_same_items(data, tmp_path, world_size):
    whole_run, halves = tmp_path / "whole", tmp_path / "halves"
    settings = merged(SSL, SHARDED)
    runs = [(whole_run, 40), (halves, 20), (halves, 40)]
    run_ranks(_train_all, world_size, [_run(data, folder, steps, **settings) for folder, steps in runs])
    one, two = find(whole_run / "checkpoints")[-1], find(halves / "checkpoints")[-1]
    assert one.step == two.step == 40
    assert _tensors(one) and _tensors(one) == _tensors(two)
    assert [r["metrics"] for r in reports(whole_run) if r["step"] > 20] == [
        r["metrics"] for r in reports(halves) if r["step"] > 20
    ]


# evaluation


def _evaluated(rank: int, world_size: int, config: RunConfig) -> dict[str, float]:
    """The untrained model on the test rows."""
    here = runtime(rank, world_size)
    data = JobData(config, here)
    model = distribute(config, here).model
    task = data.task("test")
    found = evaluation.evaluate(
        model, data.once("test"), config.schema, config.metrics, here, groups=["row"], task=task
    )
    assert (found.rows is not None) == (rank == 0)
    if found.rows is not None:
        assert sorted(found.rows.groups["row"].tolist()) == list(range(90))
    return found.metrics


def _by_hand(config: RunConfig, query: str | None, exclude: list[str]) -> dict[str, float]:
    """Lists by a full sort of all items, on one process; recall, by slice too, and MRR by a loop."""
    model, tables = build(config, table_device="cpu")
    initialise(model.state_dict(), tables, config.run.seed)
    model.eval()
    catalogue = Catalogue(
        config.schema, ItemTable(config.schema, read_footers(config.data.items), Path(config.data.cache))
    )
    (everything,) = catalogue.batches(0, 1, len(catalogue), config.views)
    vectors = model(everything)[1].representations["item"]
    loader = JobDataOnOne(config).loader("test")
    folder = Path(config.data.train).parent
    splits = [pq.read_table(folder / name) for name in ("train", "validation")]
    earlier: dict[int, set[int]] = defaultdict(set)
    for table in splits:
        for user, item in zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True):
            earlier[user].add(item)
    places = []
    for batch in loader:
        scores = model(batch)[1].representations["query"] @ vectors.T
        own = [jagged.tolist() for jagged in batch.sparse["history"].to_dense()]
        for n in torch.nonzero(batch.weights).flatten().tolist():
            left_out = set(own[n]) if exclude else set()
            user, item = int(batch.groups["user"][n]), int(batch.groups[ITEM][n])
            order = [int(catalogue.table.ids[i]) for i in scores[n].argsort(descending=True)]
            left_out |= earlier[user] if query else set()
            listed = [i for i in order if i == item or i not in left_out]
            places.append((user if query else len(places), item, listed.index(item) + 1))
    seen = Counter(splits[0]["item"].to_pylist())
    popular = sorted((int(i) for i in catalogue.table.ids), key=lambda i: (-seen[i], i))
    head = set(popular[: round(config.metrics.retrieval.head * len(popular))])
    queries, sliced = defaultdict(dict), {"head": defaultdict(dict), "tail": defaultdict(dict)}
    for user, item, place in places:
        queries[user][item] = place
        if seen[item]:
            sliced["head" if item in head else "tail"][user][item] = place
    found = {}
    for name, of_slice in sliced.items():
        hits = [sum(p <= 20 for p in q.values()) / len(q) for q in of_slice.values()]
        found[f"recall@20/slice={name}"] = float(np.mean(hits))
    for k in config.metrics.retrieval.k:
        hits = [sum(p <= k for p in q.values()) / min(k, len(q)) for q in queries.values()]
        found[f"recall@{k}"] = float(np.mean(hits))
    best = [min(q.values()) for q in queries.values()]
    found["mrr"] = float(np.mean([1 / p if p <= max(config.metrics.retrieval.k) else 0 for p in best]))
    return found


class JobDataOnOne:
    """The batches of a split as one rank gets them, outside of any job."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def loader(self, split: str) -> Loader:
        config = self._config
        table = ItemTable(config.schema, read_footers(config.data.items), Path(config.data.cache))
        return Loader(
            config.data, config.schema.of_rows(), read_footers(getattr(config.data, split)), rank=0, world_size=1,
            batch_size=16, seed=0, shuffle=False, epochs=1, join=Join(config.schema, table),
            transform=lambda batch, number: with_empty_views(batch, config.views),
        )  # fmt: skip


@pytest.mark.parametrize(("query", "exclude"), [("user", []), (None, []), ("user", ["history"]), (None, ["history"])])
def test_lists_over_the_whole_catalogue_are_exact_on_any_number_of_ranks(data, tmp_path, query, exclude):
    settings = {"metrics": {"retrieval": {"k": [3, 20], "query": query, "exclude": exclude, "block": 10}}, **SSL}
    # initial values far apart, so that no two items have nearly the same score
    config = _config(data, tmp_path, merged(settings, {"embeddings": {"init_bound": 1.0}}))
    expected = _by_hand(config, query, exclude)
    for world_size in (1, 2, 3):
        metrics = run_ranks(_evaluated, world_size, config)
        assert all(m == pytest.approx(metrics[0], nan_ok=True) for m in metrics)
        assert {name: metrics[0][name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["recall@3"] < expected["recall@20"] < 1
    assert expected["recall@20/slice=head"] != expected["recall@20/slice=tail"] != expected["recall@20"]


def test_training_stops_early_by_recall_and_evaluate_repeats_the_figures(data, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out.parquet"
    rule = {"early_stopping": {"metric": "recall@20", "patience": 2}, "eval_every": 10}
    run = _run(data, folder, 200, train=rule, checkpoint={"every": 10})
    again = merged(run, {"evaluate": {"split": "test", "predictions": str(out)}})
    (result,) = run_ranks(_train_and_evaluate, 1, run, again)
    trained, evaluated = result
    assert trained["best_step"] is not None and trained["best_step"] <= trained["step"] <= 200
    values = [(r["metrics"]["recall@20"], -r["step"]) for r in reports(folder, "validation")]
    assert trained["best_step"] == -max(values)[1]
    assert evaluated["metrics"] == pytest.approx(trained["metrics"]["test"], abs=0, nan_ok=True)
    rows = pq.read_table(out)
    assert rows["row"].to_pylist() == list(range(90))
    found = np.array(rows["retrieval_rank"].to_pylist())
    assert found.max() <= 20 and found.min() >= 0
    untrained = reports(folder, "validation")[0]["metrics"]
    assert untrained.keys() == trained["metrics"]["validation"].keys()


def _train_and_evaluate(rank: int, world_size: int, run: dict[str, Any], again: dict[str, Any]) -> tuple:
    return train.run(from_mapping(run)), evaluate.run(from_mapping(again))


def test_an_item_that_is_missing_stops_the_run_by_name_before_or_while_it_trains(data, tmp_path):
    rows = catalogues.interactions(80)
    item = rows["item"].to_numpy().copy()
    item[11] = catalogues.ABSENT[0]
    pq.write_table(rows.set_column(1, "item", pa.array(item)), tmp_path / "rows.parquet")
    run = _run(data, tmp_path / "run", 20, data={"train": str(tmp_path / "rows.parquet")})
    with pytest.raises(AssertionError, match="item 3 is not in the item table"):
        run_ranks(_train_all, 1, [run])
    once = {"steps": None, "epochs": 1}
    allowed = merged(run, {"schema": {"items": {"on_missing": "empty"}}, "train": once})
    (results,) = run_ranks(train_all, 1, [allowed])
    assert results[0]["data_policies"]["train"] == {"item.missing_item=empty": 1}
