"""Self-supervised item learning (Yao et al. 2021, arXiv 2007.12865): what can be checked about it without data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dist_rec.auxiliary import contrastive, spread_out
from dist_rec.auxiliary.contrastive.masks import masked_features
from dist_rec.auxiliary.contrastive.views import ITEM, NOISE, VIEWS, ItemViews, dropped, keep_dimensions
from dist_rec.config import RunConfig, from_mapping
from dist_rec.contract import ArchOutput
from dist_rec.data.bags import unpacked
from dist_rec.data.batch import Batch
from dist_rec.data.catalogue import Catalogue
from dist_rec.data.draws import Draws
from dist_rec.data.footers import read_footers
from dist_rec.data.ids import Ragged
from dist_rec.data.item_table import ItemTable
from dist_rec.data.join import Join
from dist_rec.data.loader import Loader
from dist_rec.data.views import view_key
from dist_rec.embeddings.sharding import initialise
from dist_rec.recommender import Recommender, build
from dist_rec.settings import ConfigError
from tests import catalogues
from tests.catalogues import CORRELATION


def loss(
    first: torch.Tensor, second: torch.Tensor, temperature: float = 0.07, ids: torch.Tensor | None = None
) -> float:
    """L_self of two given encodings, alpha = 1."""
    batch = Batch(torch.zeros(0), None, torch.zeros(0), torch.zeros(0))  # type: ignore[arg-type]
    batch.groups = {ITEM: torch.arange(len(first)) if ids is None else ids}
    config = contrastive.Config(alpha=1.0, temperature=temperature, masking="none")
    module, given = config.build(None, {}), dict(zip(VIEWS, (first, second), strict=True))  # type: ignore[arg-type]
    return module(ArchOutput(first, {}), batch, lambda view, change=None: given[view])["contrastive"].item()


def vectors(count: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1
    )


# the loss


def test_1_identical_embeddings_give_log_n():
    same = vectors(1, 16).expand(512, 16)
    assert loss(same, same) == pytest.approx(math.log(512), abs=1e-4)
    assert math.log(512) == pytest.approx(6.2383, abs=1e-4)


def test_2_identical_views_come_near_the_lower_bound_which_a_simplex_reaches():
    z = vectors(512, 128)
    assert 0 <= loss(z, z, temperature=0.03) < 1e-2
    count, temperature = 9, 0.5
    simplex = torch.nn.functional.normalize(torch.eye(count) - 1 / count, dim=1)
    bound = math.log(1 + (count - 1) * math.exp((-1 / (count - 1) - 1) / temperature))
    assert loss(simplex, simplex, temperature) == pytest.approx(bound, abs=1e-6)
    assert loss(vectors(count, 8), vectors(count, 8), temperature) > bound


def test_3_unrelated_views_cost_log_n_and_the_spread_of_their_logits():
    expected = math.log(512) + 1 / (2 * 128 * 0.07**2)
    found = np.mean([loss(vectors(512, 128, seed), vectors(512, 128, seed + 100)) for seed in range(5)])
    assert found == pytest.approx(expected, abs=0.1)


def test_10_identity_views_give_the_softmax_form_of_spread_out_regularisation():
    z, temperature = vectors(200, 16), 0.2
    similar = (z @ z.T / temperature).exp()
    others = similar.sum(1) - similar.diagonal()
    by_hand = -(math.exp(1 / temperature) / (math.exp(1 / temperature) + others)).log().mean().item()
    assert loss(z, z, temperature) == pytest.approx(by_hand, abs=1e-6)
    squared, softmax = (_spread_out(form, z, temperature) for form in ("squared", "softmax"))
    assert softmax == pytest.approx(by_hand, abs=1e-6)
    gram = (z @ z.T).square()
    assert squared == pytest.approx(((gram.sum() - gram.diagonal().sum()) / 200).item(), rel=1e-5)


def _spread_out(form: Any, z: torch.Tensor, temperature: float, ids: torch.Tensor | None = None) -> float:
    module = spread_out.Config(weight=1.0, form=form, temperature=temperature).build(None, {})  # type: ignore[arg-type]
    batch = Batch(torch.zeros(0), None, torch.zeros(0), torch.zeros(0))  # type: ignore[arg-type]
    batch.groups = {spread_out.ITEM: torch.arange(len(z)) if ids is None else ids}
    return module(ArchOutput(z, {}), batch, lambda view, change=None: z)["spread_out"].item()


def test_11_the_order_of_the_items_does_not_matter_and_copies_of_an_item_are_no_negatives():
    one, two = vectors(64, 16, 1), vectors(64, 16, 2)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    assert loss(one[order], two[order]) == pytest.approx(loss(one, two), abs=1e-5)
    twice = torch.cat([torch.arange(64), torch.arange(64)])
    doubled = loss(one.repeat(2, 1), two.repeat(2, 1), ids=twice)
    similar = (one @ two.T / 0.07).exp()
    others = 2 * (similar.sum(1) - similar.diagonal())  # those of other items, each there twice
    by_hand = -(similar.diagonal() / (similar.diagonal() + others)).log().mean().item()
    assert doubled == pytest.approx(by_hand, abs=1e-4)
    assert loss(one.repeat(2, 1), two.repeat(2, 1)) > doubled + 5e-4
    same = one.repeat(2, 1)
    assert _spread_out("softmax", same, 0.07, twice) == pytest.approx(loss(same, same, ids=twice), abs=1e-6)
    assert _spread_out("softmax", same, 0.07) > _spread_out("softmax", same, 0.07, twice) + 0.1


# masks


def test_4_masks_are_complementary_one_draw_for_all_ranks_and_new_every_step():
    names = [f"f{i}" for i in range(5)]
    nats = np.array([[0, 9, 1, 2, 3], [9, 0, 8, 1, 2], [1, 8, 0, 7, 1], [2, 1, 7, 0, 6], [3, 2, 1, 6, 0]], float)
    config, seeds = contrastive.Config(), set()
    steps = [masked_features(config, names, nats, Draws(0, "contrastive", step)) for step in range(200)]
    for first, second in steps:
        assert len(first) == 5 // 2 + 1
        assert not first & second
        assert first | second == set(names)
        matching = [i for i in range(5) if first == {names[i], *(names[j] for j in np.argsort(-nats[i])[: 5 // 2])}]
        assert matching, f"{first} is no feature and those that say most about it"
        seeds |= set(matching) if len(matching) == 1 else set()
    assert seeds == set(range(5)), "a feature was never the seed"
    changes = sum(one != two for one, two in itertools.pairwise(steps))
    assert changes > 100
    half = [masked_features(contrastive.Config(masked="half"), names, nats, Draws(0, "c", s))[0] for s in range(20)]
    assert {len(first) for first in half} == {5 // 2}


def test_4_random_masks_and_none():
    names = [f"f{i}" for i in range(5)]
    pairs = [masked_features(contrastive.Config(masking="rfm"), names, [], Draws(0, "c", s)) for s in range(300)]
    assert all(len(one) == 2 and one | two == set(names) and not one & two for one, two in pairs)
    counts = np.array([sum(name in one for one, _ in pairs) for name in names])
    assert ((counts - 120) ** 2 / 120).sum() < 18.5, "chi-square, p = 1e-3: features are not masked alike often"
    free = contrastive.Config(masking="rfm", complementary=False)
    pairs = [masked_features(free, names, [], Draws(0, "c", s)) for s in range(50)]
    assert all(len(one) == len(two) == 2 for one, two in pairs)
    assert any(one & two for one, two in pairs) and any(not one & two for one, two in pairs)
    assert masked_features(contrastive.Config(masking="none"), names, [], Draws(0, "c", 0)) == (set(), set())


def test_values_are_dropped_one_by_one_and_keep_their_order():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 9, 3000)
    bags = Ragged(lengths, np.arange(lengths.sum()), None)
    noise = Draws(0, "x", 0).bits("v", np.arange(3000))
    kept = dropped(bags, noise, 0.3)
    assert kept.lengths.sum() == len(kept.values)
    assert (np.diff(kept.values) > 0).all()
    assert len(kept.values) / len(bags.values) == pytest.approx(0.7, abs=0.02)
    owner = np.repeat(np.arange(3000), lengths)
    assert np.array_equal(np.bincount(owner[kept.values], minlength=3000), kept.lengths)
    assert (dropped(bags, noise, 0.0).values == bags.values).all()


def test_views_drop_values_of_lists_each_by_itself_and_show_nothing_that_is_hidden(tmp_path):
    data = catalogues.write(tmp_path)
    config = from_mapping(catalogues.values(data, tmp_path / "run"))
    catalogue = Catalogue(config.schema, ItemTable(config.schema, read_footers(config.data.items), data / "cache"))
    batch = Batch(torch.zeros(1000, 1), _no_ids(config, 1000), torch.zeros(1000, 0), torch.ones(1000))

    def shown(hidden: list[str]) -> tuple[np.ndarray, dict[str, Ragged]]:
        views = ItemViews(contrastive.Config(masking="none", hidden=hidden), {}, 0.3, catalogue, seed=0)
        filled = views(batch, 3, 0)
        return catalogue.table.rows(filled.groups[ITEM].numpy()), unpacked(filled.sparse)

    rows, bags = shown([])
    whole = catalogue.bags(rows)
    for view in VIEWS:
        for name in ("item", "brand"):
            assert np.array_equal(bags[view_key(name, view)].lengths, np.ones(1000))
            assert np.array_equal(bags[view_key(name, view)].values, whole[name].values)
        tags = bags[view_key("tags", view)]
        assert (tags.lengths <= whole["tags"].lengths).all()
        assert len(tags.values) / len(whole["tags"].values) == pytest.approx(0.7, abs=0.05)
    one, two = (bags[view_key("tags", view)].lengths for view in VIEWS)
    assert 0.2 < (one != two).mean() < 0.8
    _, bags = shown(["tags", "item"])
    for view in VIEWS:
        assert not len(bags[view_key("tags", view)].values) and not len(bags[view_key("item", view)].values)
        assert len(bags[view_key("brand", view)].values) == 1000


def test_masked_dimensions_differ_by_view_and_row_and_need_no_generator():
    noise = torch.from_numpy(Draws(0, "x", 0).bits("d", np.arange(500)).view(np.int64))
    rows = torch.ones(500, 3, 8)
    state = torch.get_rng_state()
    one, two = (keep_dimensions(noise, number, 0.25, rows) for number in (0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert one.mean() == pytest.approx(0.75, abs=0.02)
    assert ((one == 1) | (one == 0)).all()
    assert (one * two).mean() == pytest.approx(0.75**2, abs=0.02)
    assert (one[0] != one[1]).any()
    assert torch.equal(keep_dimensions(noise[3:4], 1, 0.25, rows[:1])[0], two[3]), "depends on the rows beside it"


# what reaches what


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Callable[..., tuple[RunConfig, Recommender, Batch]]:
    """A model on one process with its tables as plain tensors, and a training batch with views."""
    data = catalogues.write(tmp_path_factory.mktemp("ssl"))

    def prepare(**settings: Any) -> tuple[RunConfig, Recommender, Batch]:
        values = catalogues.values(
            data, data / "run", auxiliary={"contrastive": {"correlation": CORRELATION, **settings}}
        )
        config = from_mapping(values)
        table = ItemTable(config.schema, read_footers(config.data.items), data / "cache")
        rows = config.schema.of_rows()
        loader = Loader(
            config.data, rows, read_footers(config.data.train), rank=0, world_size=1, batch_size=16, seed=0,
            shuffle=False, epochs=1, join=Join(config.schema, table),
        )  # fmt: skip
        batch = next(iter(loader))
        loader.close()
        fill = config.auxiliary["contrastive"].fill(Catalogue(config.schema, table), 0)
        model, tables = build(config, table_device="cpu")
        initialise(model.state_dict(), tables, 0)
        return config, model.train(), fill(batch, 5, 0)

    return prepare


def test_8_a_masked_feature_gives_no_gradient_to_its_row_in_that_view(prepared):
    config, model, batch = prepared(value_dropout=0.0)
    bags = {key: (jt.values().tolist(), jt.lengths().tolist()) for key, jt in batch.sparse.to_dict().items()}
    features = config.schema.item_features()
    for view in VIEWS:
        model.zero_grad()
        tables = model.embeddings(batch.sparse)
        encoded = model.dense.arch.encode(batch, tables, view)
        (encoded * torch.randn(encoded.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
        masked = {f for f in features if not bags[view_key(f, view)][0]}
        assert 0 < len(masked) < len(features)
        for feature in features:
            table = config.schema.sparse[feature].table or feature
            gradient = model.embeddings.collection.embedding_bags[f"main_{table}"].weight.grad
            touched = set(torch.nonzero(gradient.abs().sum(1)).flatten().tolist())
            assert touched == set(bags[view_key(feature, view)][0]), f"{feature} in {view}"


def test_9_the_loss_reaches_item_tower_and_tables_but_never_the_query_tower(prepared):
    _, model, batch = prepared()
    tables = model.embeddings(batch.sparse)
    part = model.dense
    output = part.arch(batch.dense, tables, batch.groups)
    term = part.auxiliaries["contrastive"](
        output, batch, lambda view, change=None: part.arch.encode(batch, tables, view)
    )["contrastive"]
    term.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in part.arch.item.parameters() if p.dim() > 1)
    assert all(p.grad is None for p in part.arch.query.parameters())
    reached = {n for n, bag in model.embeddings.collection.embedding_bags.items() if bag.weight.grad.abs().sum() > 0}
    assert reached == {"main_items", "main_tags", "main_brands"}


def test_dimension_masks_reach_the_rows_of_the_views_alone(prepared):
    config, model, batch = prepared(masking="none", value_dropout=0.0, dimension_dropout=0.5)
    assert batch.groups[NOISE].shape == (16,)
    left = model(batch)[1]
    without = config.auxiliary["contrastive"]
    without.dimension_dropout = 0.0
    plain = model(batch)[1].losses
    assert left.losses["in_batch_softmax"] == plain["in_batch_softmax"]
    assert left.losses["contrastive"] > plain["contrastive"]  # without masks the two views are the same


# what is drawn


def test_7_items_are_drawn_uniformly_and_a_training_marginal_would_be_noticed(tmp_path):
    data = catalogues.write(tmp_path)
    config = from_mapping(catalogues.values(data, tmp_path / "run"))
    catalogue = Catalogue(config.schema, ItemTable(config.schema, read_footers(config.data.items), data / "cache"))
    views = ItemViews(contrastive.Config(masking="none"), {}, 0.0, catalogue, seed=0)
    batch = Batch(torch.zeros(128, 1), _no_ids(config, 128), torch.zeros(128, 0), torch.ones(128))
    drawn = np.concatenate([views(batch, step, rank).groups[ITEM].numpy() for step in range(60) for rank in range(2)])
    assert _chi_square(drawn) < _critical(len(catalogue))
    rng = np.random.default_rng(0)
    popular = rng.choice(catalogues.interactions(700)["item"].to_numpy(), len(drawn))
    assert _chi_square(popular) > _critical(len(catalogue))
    again = views(batch, 7, 1).groups[ITEM]
    assert torch.equal(again, views(batch, 7, 1).groups[ITEM])
    assert not torch.equal(again, views(batch, 8, 1).groups[ITEM])
    assert not torch.equal(again, views(batch, 7, 0).groups[ITEM])


def _no_ids(config: RunConfig, rows: int):
    from dist_rec.data.bags import empty, packed

    return packed({name: empty(rows) for name in config.schema.sparse}, np.dtype(np.int32), False)


def _chi_square(drawn: np.ndarray) -> float:
    ids = catalogues.items()["id"].to_numpy()
    counts = np.bincount(drawn, minlength=catalogues.ITEMS)[ids]
    assert counts.sum() == len(drawn), "an item was drawn that is not in the catalogue"
    expected = len(drawn) / len(ids)
    return float(((counts - expected) ** 2 / expected).sum())


def _critical(count: int) -> float:
    """Of chi-square with count - 1 degrees of freedom, p = 1e-4 (Wilson and Hilferty)."""
    degrees = count - 1
    return degrees * (1 - 2 / (9 * degrees) + 3.719 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize(
    ("settings", "key", "words"),
    [
        ({"alpha": -1.0}, "auxiliary.contrastive.alpha", "is -1.0"),
        ({"temperature": 0.0}, "auxiliary.contrastive.temperature", "is 0.0"),
        ({"value_dropout": 1.0}, "auxiliary.contrastive.value_dropout", "is 1.0"),
        ({"hidden": ["item"]}, "auxiliary.contrastive.features", "cfm needs 3 or more"),
        ({"features": ["user"]}, "auxiliary.contrastive.features", "no feature of the item"),
        ({"masking": "rfm", "features": ["item"]}, "auxiliary.contrastive.features", "rfm needs 2"),
        ({"correlation": {"id": {"tags": 1.0}}}, "auxiliary.contrastive.correlation", "dist-rec correlation"),
    ],
)
def test_bad_settings_are_named(tmp_path, settings, key, words):
    settings = {"correlation": CORRELATION, **settings}
    with pytest.raises(ConfigError) as error:
        from_mapping(catalogues.values("x", tmp_path, auxiliary={"contrastive": settings}))
    found: dict[str, str] = {}
    for complaint in error.value.complaints:
        found[complaint.key] = found.get(complaint.key, "") + complaint.text
    assert words in found[key]


def test_features_that_the_item_tower_does_not_read_are_not_masked(tmp_path):
    """Of two that it reads a view could mask both, though the item has three."""
    values = catalogues.values("x", tmp_path, model={"item": ["item", "brand"]}, auxiliary={"contrastive": {}})
    loss = values["auxiliary"]["contrastive"]
    loss["correlation"] = CORRELATION
    with pytest.raises(ConfigError, match=r"contrastive\.features: would mask tags, which the model does not read"):
        from_mapping(values)
    loss["features"] = ["item", "brand"]
    with pytest.raises(ConfigError, match=r"contrastive\.features: gives 2 maskable feature.* cfm needs 3"):
        from_mapping(values)
    loss["masking"] = "rfm"
    from_mapping(values)


def test_a_model_without_views_refuses_the_loss(tmp_path):
    values = catalogues.values("x", tmp_path, auxiliary={"contrastive": {"correlation": CORRELATION}})
    values["model"], values["objective"] = {"name": "dlrm"}, {"name": "bce"}
    values["schema"]["labels"] = {"click": None}
    with pytest.raises(ConfigError, match="views of items, which model 'dlrm' does not encode"):
        from_mapping(values)
