"""What the studies share: trainings in worker processes whose outcomes are kept, and intervals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from scripts.studies.trials import Trial, interval, outcomes
from tests.runs import table, values


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    part = tmp_path / "part"
    part.mkdir()
    for split, seed in (("train", 1), ("validation", 2), ("test", 3)):
        pq.write_table(table(200, seed), part / f"{split}.parquet")
    card = tmp_path / "card.yaml"
    card.write_text(yaml.safe_dump(values(part / "train.parquet", tmp_path / "unused")))
    return Trial(card, ("train.steps=4", "train.epochs=1"), part)


def test_an_outcome_has_the_rows_in_file_order_and_is_kept(trial: Trial, tmp_path: Path) -> None:
    failing = Trial(trial.card, ("train.steps=0",), trial.part)
    (first,) = outcomes([trial], tmp_path / "work")
    test = pq.read_table(trial.part / "test.parquet")
    assert set(first.columns) == {"logit_click", "probability_click", "label_click", "weight", "row", "domain", "user"}
    assert first.columns["row"].tolist() == test["row"].to_pylist()
    assert first.columns["label_click"].tolist() == test["click"].to_pylist()
    assert first.result["step"] == 4 and first.metrics["ne"] == pytest.approx(first.result["metrics"]["test"]["ne"])
    (kept,) = (tmp_path / "work/trials").iterdir()
    written = kept.stat().st_mtime_ns
    (again,) = outcomes([trial], tmp_path / "work")
    assert np.array_equal(again.columns["logit_click"], first.columns["logit_click"])
    assert kept.stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match=r"(?s)trial 0, .*train\.steps=0.*is 0"):
        list(outcomes([failing], tmp_path / "work"))


def test_a_trial_is_named_after_all_that_goes_into_it(trial: Trial) -> None:
    others = [Trial(trial.card, (*trial.overrides, "run.seed=1"), trial.part)]
    others += [Trial(trial.card, trial.overrides, trial.part, split="validation")]
    names = {t.name for t in [trial, *others]}
    trial.card.write_text(trial.card.read_text() + "# a remark\n")
    assert trial.name in names
    base = trial.card.rename(trial.card.with_name("base.yaml"))
    trial.card.write_text("base: base.yaml\n")
    assert trial.name in names
    base.write_text(base.read_text().replace("dim: 8", "dim: 12"))
    names.add(trial.name)
    pq.write_table(table(201, 1), trial.part / "train.parquet")
    names.add(trial.name)
    assert len(names) == 5


def test_the_interval_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776445 * np.sqrt(2.5 / 5), rel=1e-6)  # the tabulated quantile for 4 degrees
    assert np.isnan(interval([1.0])[1])
