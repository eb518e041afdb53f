"""The retrieval study: its data and the baselines by hand, what is tried and chosen, and the tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.config import from_mapping, read
from dist_rec.metrics.retrieval import RetrievalMetrics
from dist_rec.training.report import to_json
from scripts.studies import retrieval_data
from scripts.studies.real_data import card
from scripts.studies.retrieval import (
    CARDS,
    COLUMNS,
    METRICS,
    TUNING_SEED,
    Case,
    Job,
    Setting,
    auxiliary,
    report,
    scores,
    tune,
)
from scripts.studies.trials import Outcome

CASE = Case("beauty", "two_tower", 0.1)
USERS = {1: [5, 6, 7, 8], 2: [6, 5, 8, 7], 3: [5, 6, 9, 7]}


def _amazon(folder: Path, users: dict[int, list[int]] = USERS) -> Path:
    """A few users, in files as the data folder has them."""
    rows = [
        (user, item, pos, max(0, pos - len(items) + 3))
        for user, items in users.items() for pos, item in enumerate(items)
    ]  # fmt: skip
    (folder / "s3rec_amazon").mkdir()
    columns = dict(zip(("user_id", "item_id", "pos", "split"), zip(*rows, strict=True), strict=True))
    pq.write_table(
        pa.table({n: list(v) for n, v in columns.items()}), folder / "s3rec_amazon/beauty_interactions.parquet"
    )
    attributes = [[1, 2], [3, 2, 4], [2], [], [1, 4]]
    items = pa.table({"item_id": [5, 6, 7, 8, 9], "attributes": pa.array(attributes, pa.list_(pa.int64()))})
    pq.write_table(items, folder / "s3rec_amazon/beauty_items.parquet")
    return folder


def test_rows_have_what_came_before_and_items_their_brand(tmp_path: Path) -> None:
    folder = retrieval_data.prepare("beauty", _amazon(tmp_path), tmp_path / "all", 1)
    test = pq.read_table(folder / "test.parquet").to_pylist()
    assert test[0] == {"user_id": 1, "item_id": 8, "history": [7, 6, 5], "recent": [7, 6]}
    train = pq.read_table(folder / "train.parquet")
    assert train["item_id"].to_pylist() == [5, 6, 6, 5, 5, 6] and train["history"].to_pylist()[:2] == [[], [5]]
    items = pq.read_table(folder / "items.parquet")
    assert items["brand"].to_pylist() == [1, 3, 0, 0, 1], "2 is a category: of one item it is not the first"
    assert items["categories"].to_pylist() == [[2], [2, 4], [2], [], [4]]
    less = retrieval_data.prepare("beauty", tmp_path, tmp_path / "half", 0.5)
    assert pq.read_metadata(less / "train.parquet").num_rows == 3
    assert pq.read_table(less / "test.parquet").to_pylist() == test


def test_baselines_by_hand(tmp_path: Path) -> None:
    """After train (5, 6 by all) and their earlier items are left out, ties stand in the order of the ids."""
    folder = retrieval_data.prepare("beauty", _amazon(tmp_path), tmp_path / "all", 1)
    found = retrieval_data.baselines("beauty", folder, RetrievalMetrics(k=[1, 2]))
    # left are {8, 9}, {7, 9} and {7, 8}, all as frequent: every target is the first
    assert found["popularity"].metrics["recall@1"] == 1
    assert found["popularity"].metrics["recall@1/slice=unseen"] == 1
    near = retrieval_data._cosines(np.array([1, 1, 2, 2, 3]), np.array([5, 6, 5, 7, 5]), 8)
    assert near[5, 6] == pytest.approx(1 / 3**0.5) and near[6, 7] == 0 and near[5, 5] == 0


def test_lists_of_both_baselines_by_hand(tmp_path: Path) -> None:
    """In train 5 goes with 8, and 7 with 9; 5, 7 and 9 are there twice, 8 once, 6 never."""
    users = {1: [5, 6, 8], 2: [5, 8, 6, 9], 3: [7, 9, 5, 6], 4: [7, 9, 8, 5]}
    folder = retrieval_data.prepare("beauty", _amazon(tmp_path, users), tmp_path / "all", 1)
    found = retrieval_data.baselines("beauty", folder, RetrievalMetrics(k=[1, 2]))
    # lists of items that go with earlier ones first: 8 7 9, 7 9, 8 6 and 5 6
    assert found["item_knn"].metrics["recall@1"] == 2 / 4
    assert found["item_knn"].metrics["mrr"] == (1 + 1 / 2 + 1 / 2 + 1) / 4
    # lists of frequent items first: 7 9 8, 7 9, 8 6 and 5 6
    assert found["popularity"].metrics["recall@1"] == 1 / 4
    assert found["popularity"].metrics["mrr"] == (0 + 1 / 2 + 1 / 2 + 1) / 4


def test_a_link_does_not_know_of_itself() -> None:
    columns = {"src": [1, 1, 1, 1], "dst": [2, 3, 4, 5], "split": [0, 0, 1, 2]}
    rows, split = retrieval_data._links(pa.table(columns))
    assert rows["linked"].to_pylist() == [[], [], [2, 3], [2, 3, 4]] and split.tolist() == columns["split"]


def test_alpha_is_chosen_first_and_then_the_dropout() -> None:
    tried: list[Job] = []

    def run(jobs: Sequence[Job]) -> list[Outcome]:
        tried.extend(jobs)
        # best together: 0.3 and 0.1; but at the first dropout 1.0 is
        found = [2.0 if job.setting == (0.3, 0.1) else job.setting.alpha - (job.setting.dropout or 0) for job in jobs]
        return [Outcome({}, {"recall@50": figure}, {}) for figure in found]

    chosen = tune(run, [CASE], {"rfm": [0.1, 0.3, 1.0], "so": [0.01, 1.0]}, [0.5, 0.1])
    assert chosen == {(CASE, "rfm"): Setting(1.0, 0.1), (CASE, "so"): Setting(1.0)}
    assert [j.setting for j in tried if j.arm == "rfm"] == [
        Setting(0.1, 0.5), Setting(0.3, 0.5), Setting(1.0, 0.5), Setting(1.0, 0.5), Setting(1.0, 0.1)
    ]  # fmt: skip
    assert [j.setting for j in tried if j.arm == "so"] == [Setting(0.01), Setting(1.0)]
    assert all(job.seed == TUNING_SEED and job.split == "validation" for job in tried)
    tried.clear()
    assert tune(run, [CASE], {"rfm": [0.3]}, [0.2]) == {(CASE, "rfm"): Setting(0.3, 0.2)} and not tried


@pytest.mark.parametrize(("name", "model"), [*((n, "two_tower") for n in CARDS), ("toys", "history")])
@pytest.mark.parametrize("arm", ["two_tower", "so", "rfm", "cfm"])
def test_every_arm_is_a_config(name: str, model: str, arm: str) -> None:
    values = read(str(card(CARDS[name], model)))
    columns = ("dst", "nouns", "traffic") if name == "squirrel" else ("item_id", "brand", "categories")
    information = {a: {b: 1.0 for b in columns if b != a} for a in columns}
    setting = {"two_tower": None, "so": Setting(0.1)}.get(arm, Setting(0.1, 0.3))
    config = from_mapping({**values, "auxiliary": auxiliary(arm, setting, information, 0.3)})
    assert bool(config.views) == (arm != "two_tower")
    if arm in ("rfm", "cfm"):
        assert config.auxiliary["contrastive"].temperature == 0.3


def test_tables_pair_the_seeds() -> None:
    def of(value: float) -> dict[str, Any]:
        figures = {name + column: value for name in METRICS for column in COLUMNS}
        figures |= {f"{name}/slice=unseen": float("nan") for name in METRICS}
        return json.loads(to_json(figures))  # as a trial's outcome comes from its file

    plain, other = scores([of(0.1), of(0.3)]), scores([of(0.2), of(0.4)])
    settings = {"cfm": Setting(0.3, 0.5), "so": Setting(1)}
    found = {"popularity": scores([of(0.05)]), "two_tower": plain, "cfm": other}
    lines = list(report(Case("toys", "two_tower", 1.0), [9, 4, 5, 0], settings, found))
    text = "\n".join(lines)
    assert "cfm alpha 0.3, dropout 0.5; so weight 1" in text
    assert "| popularity | 0.0500 | 0.0500 | 0.0500 |  |" in text
    assert "| cfm | +0.1000 ± 0.0000 (+50.0%)" in text  # exact by seed, though the seeds lie far apart
    assert "| MAP@10 | all: 9 | head: 4 | tail: 5 | unseen: 0 |" in text
    assert "| *two_tower, untuned, of the data's README* | 0.030 |" in text
