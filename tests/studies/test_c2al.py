"""The study of C2AL: its derived column and its differences by hand; the cards accept every arm's settings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.config import load, to_mapping
from dist_rec.data.cohorts import Cohorts
from scripts.studies import c2al, real_data
from scripts.studies.trials import SPLITS, Outcome
from tests.examples import COHORTS

ARMS = [*c2al._arms([0.1, 1.0], [0.3], c2al.BASELINES)]


def test_activity_counts_the_other_training_rows_of_an_id(tmp_path: Path) -> None:
    ids = {"train": [4, 4, 0, 2, 4], "validation": [4, 0, 2], "test": [2, 2, 4]}
    for split in SPLITS:
        pq.write_table(pa.table({c2al.ACTIVITY_OF: ids[split]}), tmp_path / f"{split}.parquet")
    c2al.add_activity(tmp_path)
    tables = [pq.read_table(tmp_path / f"{split}.parquet") for split in SPLITS]
    assert [t["activity"].to_pylist() for t in tables] == [[2, 2, 0, 0, 2], [3, 0, 1], [1, 1, 3]]
    assert pa.concat_tables(tables)["row"].to_pylist() == list(range(11))


def test_missing_data_are_named_before_anything_trains(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"ratings.parquet does not exist; give the folder .* with --data"):
        c2al.main(["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--cases", "ml100k-age"])


def test_an_arm_for_every_lambda_and_baseline() -> None:
    names = [(arm.name, arm.factor) for arm in ARMS]
    assert names == [
        ("plain", None), ("c2al", 0.1), ("c2al", 1.0), ("random", 0.3),
        ("reweighted", None), ("group_dro", None), ("pcgrad", None),
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["dhen", "dcn"])
@pytest.mark.parametrize("name", list(c2al.CASES))
def test_the_cards_accept_every_arm(name: str, model: str, tmp_path: Path) -> None:
    case = c2al.CASES[name]
    axis = case.axis.split(":")[0]
    found = {**COHORTS, "axes": [axis], "edges": {axis: None}, "head": {axis: 2}, "tail": {axis: 0}, "label": "label"}
    for arm in ARMS:
        overrides = c2al._overrides(case, model, 3, arm, found)
        config = load(str(real_data.card(case.set, model)), [*overrides, f"run.dir={tmp_path}/run"])
        names = {section: to_mapping(config)[section]["name"] for section in ("model", "objective")}
        assert config.run.seed == 3
        assert names == {"model": model, "objective": arm.name if arm.name in c2al.BASELINES[1:] else "bce"}
        heads = config.auxiliary.get("c2al")
        assert (heads is not None) == (arm.name in ("c2al", "random"))
        assert heads is None or heads.lambda_head == heads.lambda_tail == arm.factor


def _outcome(logits: list[float], labels: list[int]) -> Outcome:
    columns = {"logit_label": np.array(logits), "label_label": np.array(labels), "domain": np.array([2, 2, 0, 0, 1, 1])}
    columns |= {"row": np.arange(6), "user": np.array([7, 7, 5, 5, 5, 3])}
    return Outcome(columns, {}, {})


def test_differences_and_their_half_widths_by_hand() -> None:
    members, labels = Cohorts(**COHORTS), [1, 0, 1, 0, 1, 0]
    plain = [c2al.scores([_outcome([0.0] * 6, labels)], members, "row") for _ in range(2)]
    assert plain[0].ne == [1.0] * 3 and plain[0].auc == [0.5] * 3
    assert [len(losses) for losses in plain[0].losses] == [6, 2, 2]
    better = [c2al.scores([_outcome([z, 0, 0, 0, 0, 0], labels)], members, "row") for z in (1.0, 2.0)]
    gains = [np.log(2) - np.log1p(np.exp(-z)) for z in (1.0, 2.0)]
    for part, rows in ((0, 6), (1, 2)):
        mean, over_seeds, over_rows = c2al.difference(better, plain, part)
        percent = [-100 * gain / rows / np.log(2) for gain in gains]
        assert mean == pytest.approx(np.mean(percent), rel=1e-12)
        # Student's quantile for one degree of freedom, the standard error of two figures
        assert over_seeds == pytest.approx(12.7062 * np.std(percent, ddof=1) / 2**0.5, rel=1e-4)
        change = np.array([-np.mean(gains), *[0.0] * (rows - 1)])
        expected = 100 * 1.96 * change.std(ddof=1) / rows**0.5 / np.log(2)
        assert over_rows == pytest.approx(expected, rel=1e-12)
    assert c2al.difference(better, plain, 2) == (0, 0, 0)
    table = [*c2al.report("a case", _found(), {c2al.PLAIN: plain, c2al.Arm("c2al", 0.1): better})]
    assert table[-1].startswith("| c2al | 0.1 | -")
    assert table[-1].endswith("| +0.000 ± 0.000 ± 0.000 |")


def _found() -> dict:
    divergence = {"measure": "js", "of_head_and_tail": 0.1}
    return {**COHORTS, "divergence": divergence, "rows": 10, "positives": 5}


def test_rows_of_a_user_are_one_observation_and_those_of_two_parts_are_two() -> None:
    members, labels = Cohorts(**COHORTS), [1, 0, 1, 0, 1, 0]

    def half_width(unit: str, parts: int) -> float:
        plain, better = (
            [c2al.scores([_outcome(z, labels)] * parts, members, unit)] for z in ([0.0] * 6, [1.0, -1, 0, 0, 0, 0])
        )
        return c2al.difference(better, plain, 0)[2]

    gain = np.log(2) - np.log1p(np.exp(-1))  # of both rows of user 7
    for parts in (1, 2):
        rows, users = 6 * parts, 3 * parts
        change = np.array([-gain, -gain, 0, 0, 0, 0] * parts)
        residuals = np.array([(change - change.mean())[k].sum() for k in ([0, 1], [2, 3, 4], [5])] * parts)
        expected = (users / (users - 1) * (residuals**2).sum()) ** 0.5 / rows
        assert half_width("user", parts) == pytest.approx(196 * expected / np.log(2), rel=1e-12)
        assert half_width("user", parts) > half_width("row", parts)
