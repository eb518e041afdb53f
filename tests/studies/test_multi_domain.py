"""The study of the multi-domain models: its domains, arms, scores and tables; the trainings are those of trials.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dist_rec.config import from_mapping, load, read
from scripts.studies import multi_domain
from scripts.studies.real_data import card
from scripts.studies.trials import SPLITS, Outcome

CROCODILE = "crocodile"


def outcome(logits: list[float], labels: list[int], users: list[int], domains: list[int], **more: Any) -> Outcome:
    """What a trial found on rows of weight 1."""
    columns = {"logit_label": logits, "label_label": labels, "user": users, "domain": domains}
    weights = {"weight": np.ones(len(logits))}
    return Outcome({name: np.array(values) for name, values in columns.items()} | weights, {}, {}, **more)


def test_a_films_domain_is_its_rarest_frequent_genre() -> None:
    # eight genres, g of them in 10 - g training rows: 7 is the one that is no domain of its own
    train = [[g] for g in range(8) for _ in range(10 - g)]
    rows = [*train, [0, 3], [3, 0], [7], [], [7, 1], [99]]
    found = multi_domain.genre_domains(rows, len(train))
    assert found[: len(train)] == [row[0] for row in train]
    assert found[len(train) :] == [3, 3, 7, 7, 1, 7]
    # later rows do not count, however many there are
    assert multi_domain.genre_domains([*train, *[[7]] * 50], len(train))[-1] == multi_domain.GENRES


def test_scores_of_all_rows_and_of_each_domain() -> None:
    # domain 0: user 1 ranks one of two pairs rightly, user 2 its only one; domain 1: user 0 its only one wrongly
    found = multi_domain.scores(
        outcome([2, 1, 0, 1, -1, 0, 1], [1, 0, 1, 1, 0, 1, 0], [1, 1, 1, 2, 2, 0, 0], [0, 0, 0, 0, 0, 1, 1]), 3, None
    )
    assert found.shape == (4, len(multi_domain.METRICS))
    # in all, the positives 2 0 1 0 against the negatives 1 -1 1; by user, weighted by rows
    assert found[0, 0] == pytest.approx((3 + 1 + 2 + 1) / 12)
    assert found[0, 1] == pytest.approx((3 * 0.5 + 2 * 1 + 2 * 0) / 7)
    assert found[1, 1] == pytest.approx((3 * 0.5 + 2 * 1) / 5)
    assert found[2, :2].tolist() == [0, 0]
    # NE of domain 1: the mean of ln 2 and ln(1 + e) over ln 2
    assert found[2, 2] == pytest.approx((np.log(2) + np.log1p(np.e)) / (2 * np.log(2)))
    assert np.isnan(found[3]).all(), "nobody is in domain 2"


def test_users_without_training_rows_are_in_no_auc_by_user() -> None:
    rows = outcome([2, 1, 0, 1], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0])
    every, known = (multi_domain.scores(rows, 1, unseen) for unseen in (None, 0))
    assert every[0].tolist()[1] == 0.5 and known[0].tolist()[1] == 1
    assert every[0, [0, 2]].tolist() == known[0, [0, 2]].tolist()


@pytest.mark.parametrize("name", multi_domain.NAMES)
def test_every_arm_is_a_config_that_differs_from_the_card_in_what_its_name_says(name: str) -> None:
    values = read(str(card(name, CROCODILE)))
    arms = multi_domain.arms(values)
    configs = {arm: from_mapping({**values, **sections}) for arm, sections in arms.items()}
    assert {type(c.model).__module__.rsplit(".", 1)[1] for c in configs.values()} == {
        "shared_bottom", "mmoe", "ple", "star", "pepnet", "stem", "me_mmoe", "me_ple", CROCODILE
    }  # fmt: skip
    assert all(c.objective == configs[CROCODILE].objective for c in configs.values()), "the same loss for all"
    whole = load(str(card(name, CROCODILE)))
    assert configs[CROCODILE].model == whole.model and configs[CROCODILE].auxiliary == whole.auxiliary
    assert not configs["crocodile, no CovLoss"].auxiliary and not configs["crocodile, no PEG"].model.prior
    assert configs["crocodile, one set"].model == replace(whole.model, single_set=True)
    assert configs["crocodile, 5 sets"].model == replace(whole.model, num_experts=5)
    assert configs["ple, 1 level"].model == replace(configs["ple"].model, levels=1)
    assert configs["shared_bottom, wide"].model == replace(configs["shared_bottom"].model, dim=48)
    alphas = [configs[f"crocodile, alpha {alpha}"].auxiliary["covariance"].alpha for alpha in multi_domain.ALPHAS]
    assert alphas == list(multi_domain.ALPHAS) and whole.auxiliary["covariance"].alpha not in alphas


def test_tables_have_the_mean_over_seeds_and_differences_paired_by_seed(tmp_path: Path) -> None:
    config = load(str(card("ml100k_genres", CROCODILE)))
    for split in SPLITS:
        domains = pa.table({"domain": [0] * (4 if split == "train" else 2) + [1] * 3})
        pq.write_table(domains, tmp_path / f"{split}.parquet")
    users, domains, labels = [0, 0, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]
    good, bad = [1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]
    tested = {
        "shared_bottom": [outcome(logits, labels, users, domains) for logits in (bad, good)],
        CROCODILE: [outcome(good, labels, users, domains, diagnostics={"correlation": c}) for c in (0.25, 0.25)],
    }
    lines = list(multi_domain.report("ml100k_genres", tmp_path, config, tested))
    text = "\n".join(lines)
    assert "## ml100k_genres: 2 seeds" in text and "| AUC | all | 0: 4 / 2 | 1: 3 / 3 | 2: 0 / 0 |" in text
    # AUC in domain 0 is 0 and 1: t of one degree is 12.706, times sd 0.7071 over the root of 2
    (plain, difference) = [line.split(" | ") for line in lines if line.startswith("| shared_bottom |")][:2]
    assert plain[2] == "0.5000 ± 6.3531" and plain[3] == "1.0000 ± 0.0000"
    assert difference[2] == "-0.5000 ± 6.3531" and difference[3] == "+0.0000 ± 0.0000"
    assert lines[-1] == "| crocodile | 0.2500 ± 0.0000 |", "only what has experts has a correlation"
    assert text.count("| AUC - crocodile |") == 1


def test_mistakes_end_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"reviews.parquet does not exist; give the folder .* with --data"):
        multi_domain.main(["--data", str(tmp_path), "--work", str(tmp_path), "--sets", "yelp_hin"])
    part = tmp_path / "yelp_hin" / "all"
    part.mkdir(parents=True)
    for split in SPLITS:
        (part / f"{split}.parquet").touch()
    with pytest.raises(
        SystemExit, match="no arm is called 'crocodil'; there are: shared_bottom; shared_bottom, wide; mmoe; ple"
    ):
        multi_domain.main(["--work", str(tmp_path), "--sets", "yelp_hin", "--arms", "crocodil"])
