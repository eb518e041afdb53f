"""The arithmetic of the MLET study: slices by rarity, pooled scores, and the reduction in width."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.config import load
from dist_rec.embeddings.tables import make_tables
from dist_rec.metrics.binary import log_loss
from scripts.studies import mlet
from scripts.studies.mlet import Arm, Scores
from scripts.studies.trials import Outcome


def test_rarest_counts_training_rows_and_skips_id_0(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 1, 1, 2, 0], "b": [7, 7, 0, 0, 7]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"a": [1, 2, 0, 0, 1], "b": [7, 7, 7, 0, 8]}), tmp_path / "test.parquet")
    found = mlet.rarest(tmp_path, ["a", "b"]).tolist()
    assert found == [3, 1, 3, np.iinfo(np.int64).max, 0], "the last one's 8 is beyond every id of train"


def test_scores_pool_the_parts_and_slice_by_rarity() -> None:
    logits, labels = np.array([0.5, -1.0, 2.0, 0.1]), np.array([1.0, 0.0, 1.0, 0.0])
    parts = [Outcome({"logit_label": logits[i : i + 2], "label_label": labels[i : i + 2]}, {}, {}) for i in (0, 2)]
    found = mlet.scores(parts, [np.array([1, 2]), np.array([3, 500])])
    assert found.auc == pytest.approx(1.0)
    assert found.slices[0] == pytest.approx(log_loss(logits[:2], labels[:2], np.ones(2)))
    assert found.slices[1] == pytest.approx(np.log1p(np.exp(-2.0)))
    assert np.isnan(found.slices[2]) and found.slices[3] == pytest.approx(np.log1p(np.exp(0.1)))


def test_the_reduction_is_the_smallest_width_that_is_no_worse() -> None:
    ne = {(2, 0): 0.96, (4, 0): 0.95, (8, 0): 0.94, (2, 16): 0.95, (4, 16): 0.945, (8, 16): 0.93}
    arms = [Arm("s", "m", d, k) for d, k in ne]
    results = {arm: [Scores(0.7, ne[arm.d, arm.k], ())] for arm in arms}
    (line,) = mlet.reduction(arms, results)
    assert line.endswith("2 -> 2 (1 x), 4 -> 2 (2 x), 8 -> 8 (1 x)")


@pytest.mark.parametrize(("name", "model"), list(product(("criteo1tb_80k", "lowrank"), ("dlrm", "dcn"))))
def test_the_configs_of_the_whole_grid_are_good(name: str, model: str, tmp_path: Path) -> None:
    """Also where a width is no multiple of 4, and where a table has too few rows for a second layer."""
    widths = [(d, k) for d, k in product((2, 4, 64), (mlet.PLAIN, 6, 16, 64)) if k == mlet.PLAIN or k >= d]
    trials = {(d, k): mlet._trial(Arm(name, model, d, k), 0.1, 0, tmp_path) for d, k in widths}
    trials |= {(min(8, k), k): mlet.tuning_trial(name, model, k, 0.1, tmp_path) for k in (4, 16)}
    for (d, k), trial in trials.items():
        config = load(str(trial.card), ["run.device=cpu", f"run.dir={tmp_path}", *trial.overrides])
        tables = make_tables(config.model.table_sets(config.schema), config.schema, config.embeddings)
        assert {t.dim for t in tables} == {d} and {t.inner_dim for t in tables} <= {k or None, None}
        assert any(t.inner_dim == (k or None) for t in tables)
        assert all(t.sharding == "data_parallel" for t in tables if t.width % 4)


def test_a_rate_is_not_chosen_at_the_edge_of_what_was_tried() -> None:
    assert mlet.beyond({0.02: 0.9, 0.05: 0.8, 0.1: 0.85}) == ()
    assert mlet.beyond({0.02: 0.9, 0.05: 0.8, 0.1: 0.75}) == (0.2,)
    assert mlet.beyond({0.02: 0.7, 0.05: 0.8, 0.1: 0.75}) == (0.01,)
    for best in (0.003, 0.07, 4.0):
        tried = {rate: abs(math.log(rate / best)) for rate in mlet.LEARNING_RATES}
        while new := mlet.beyond(tried):
            tried |= {rate: abs(math.log(rate / best)) for rate in new}
        assert min(tried, key=tried.__getitem__) == pytest.approx(best, rel=0.5)
    assert mlet.beyond({4.0: 0.8, 2.0: 0.9}) == mlet.beyond({0.0015: 0.8, 0.003: 0.9}) == (), "there is an end"


def test_the_low_rank_set_has_what_is_planted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mlet.write_lowrank(tmp_path, {"ids": 300, "rank": 3, "train": 3000, "validation": 500, "test": 4000})
    test = pq.read_table(tmp_path / "test.parquet")
    assert 0.85 < float(capsys.readouterr().out.split()[-1]) < 0.98
    assert len(test) == 4000 and 0.2 < np.mean(test["label"].to_numpy()) < 0.6
    counts = np.sort(np.bincount(test["c0"].to_numpy()))[::-1]
    assert counts[0] > 20 * counts[100]  # Zipf
    written = (tmp_path / "train.parquet").stat().st_mtime_ns
    mlet.write_lowrank(tmp_path)
    assert (tmp_path / "train.parquet").stat().st_mtime_ns == written
