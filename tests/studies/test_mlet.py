"""The arithmetic of the MLET study: slices by rarity, pooled scores, and the reduction in width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.metrics.binary import log_loss
from scripts.studies import mlet
from scripts.studies.mlet import Arm, Scores
from scripts.studies.trials import Outcome


def test_rarest_counts_training_rows_and_skips_id_0(tmp_path: Path) -> None:
    pq.write_table(pa.table({"a": [1, 1, 1, 2, 0], "b": [7, 7, 0, 0, 7]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"a": [1, 2, 0, 0], "b": [7, 7, 7, 0]}), tmp_path / "test.parquet")
    assert mlet.rarest(tmp_path, ["a", "b"]).tolist() == [3, 1, 3, np.iinfo(np.int64).max]


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
