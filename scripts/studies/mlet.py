"""Quality of MLET's two-layer tables against plain ones of the same served width, with confidence intervals.

    .venv/bin/python -m scripts.studies.mlet [--sets criteo1tb_80k lowrank] [--models dlrm dcn] [--dims 2 4 8 16 32 64]
                                             [--inner 16 64 128] [--seeds 0 1 2 3 4] [--processes 2] [--work .data/mlet]

For every set, model, served width d and inner width k >= d: trains the experiment card configs/<set>/<model>.yaml with
and without `embeddings.inner_dim: k` and prints Markdown tables. A trial is kept under --work and not repeated.

criteo1tb_80k: five folds as in `real_data.py`, whose predictions are pooled; a seed is one pass over all five. lowrank:
a synthetic set, see `write_lowrank`, where categories share planted directions; a seed draws the model, not the data.

The learning rate of the tables is chosen alike for plain and two-layer tables: per set, model and k, at d = TUNED_DIM
(or k, if that is less), the best NE on validation rows with a seed that the tables do not use. Where the least or the
largest of LEARNING_RATES is the best, half or twice that is tried next, within RATE_LIMITS: an arm whose best rate lies
outside of what was tried would be at a disadvantage.

Tables: AUC and NE with 95 % intervals over seeds; differences to plain d, paired by seed; log loss by how often the
rarest id of a row was seen in training; and for every d the smallest width at which MLET is no worse than plain d.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_rec.config import load
from dist_rec.embeddings.tables import make_tables
from dist_rec.metrics.binary import auc, log_loss, normalized_entropy
from scripts.studies import real_data
from scripts.studies.trials import SPLITS, Outcome, Trial, interval, outcomes

LEARNING_RATES, RATE_LIMITS = (0.02, 0.05, 0.1, 0.2), (0.001, 5.0)
TUNED_DIM, TUNING_SEED = 8, 1000
PLAIN = 0  # the inner width that stands for a single layer
RARITY = (1, 3, 11, 101)  # slices of rows by the training count of their rarest id: 1-2, 3-10, 11-100, more
LOWRANK = {"ids": 4000, "rank": 3, "train": 120_000, "validation": 20_000, "test": 50_000}


class Arm(NamedTuple):
    """A cell of the grid; k is PLAIN for a single layer."""

    set: str
    model: str
    d: int
    k: int


class Scores(NamedTuple):
    """Figures of one seed: overall, and the log loss of each slice of RARITY (nan where it has no rows)."""

    auc: float
    ne: float
    slices: tuple[float, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, prepares, tunes, trains the grid and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=real_data.ROOT.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=real_data.ROOT / ".data/mlet")
    parser.add_argument("--sets", nargs="+", choices=("criteo1tb_80k", "lowrank"), default=["criteo1tb_80k", "lowrank"])
    parser.add_argument("--models", nargs="+", choices=real_data.MODELS, default=list(real_data.MODELS))
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--inner", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(arguments)
    for name, model in product(args.sets, args.models):
        parts = _parts(name, args.data, args.work.absolute() / name)
        rates = tune(name, model, args.inner, parts, args.work, args.processes)
        arms = [Arm(name, model, d, k) for d in args.dims for k in (PLAIN, *args.inner) if k == PLAIN or k >= d]
        results = grid(arms, rates, args.seeds, parts, args.work, args.processes)
        print("\n".join(report(arms, results, rates)), flush=True)


def tune(
    name: str, model: str, inner: Sequence[int], parts: list[Path], work: Path, processes: int
) -> dict[int, float]:
    """k -> the learning rate of the tables with the least validation NE, mean over the folds."""
    tried: dict[int, dict[float, float]] = {k: {} for k in (PLAIN, *inner)}
    wanted: dict[int, Sequence[float]] = dict.fromkeys(tried, LEARNING_RATES)
    while places := [(k, rate) for k, rates in wanted.items() for rate in rates]:
        trials = [tuning_trial(name, model, k, rate, part) for k, rate in places for part in parts]
        found = [outcome.metrics["ne"] for outcome in outcomes(trials, work, processes)]
        means = np.reshape(found, (len(places), len(parts))).mean(axis=1)
        for (k, rate), ne in zip(places, means, strict=True):
            tried[k][rate] = float(ne)
        wanted = {k: beyond(by_rate) for k, by_rate in tried.items()}
    return {k: min(by_rate, key=by_rate.__getitem__) for k, by_rate in tried.items()}


def beyond(tried: dict[float, float]) -> tuple[float, ...]:
    """The next rate to try, if the best of those tried (rate -> NE) is the least or the largest of them."""
    best = min(tried, key=tried.__getitem__)
    found = [best / 2] if best == min(tried) else []
    found += [best * 2] if best == max(tried) else []
    return tuple(rate for rate in found if RATE_LIMITS[0] <= rate <= RATE_LIMITS[1])


def tuning_trial(name: str, model: str, k: int, rate: float, part: Path) -> Trial:
    """By which a learning rate is judged for an inner width."""
    d = TUNED_DIM if k == PLAIN else min(TUNED_DIM, k)
    return _trial(Arm(name, model, d, k), rate, TUNING_SEED, part, split="validation")


def grid(
    arms: list[Arm], rates: dict[int, float], seeds: Sequence[int], parts: list[Path], work: Path, processes: int
) -> dict[Arm, list[Scores]]:
    """The scores of every arm, a seed each; a seed's predictions of all parts are pooled."""
    places = [(seed, arm) for seed in seeds for arm in arms]
    trials = [_trial(arm, rates[arm.k], seed, part) for seed, arm in places for part in parts]
    found = outcomes(trials, work, processes)
    results: dict[Arm, list[Scores]] = {arm: [] for arm in arms}
    features = list(load(str(real_data.card(arms[0].set, arms[0].model))).schema.sparse)
    counts = [rarest(part, features) for part in parts]
    for _, arm in places:
        results[arm].append(scores([next(found) for _ in parts], counts))
    return results


def scores(found: Sequence[Outcome], counts: Sequence[np.ndarray]) -> Scores:
    """Figures of the pooled predictions of all parts; counts: `rarest` of each part's test rows."""
    logits = np.concatenate([o.columns["logit_label"] for o in found]).astype(np.float64)
    labels = np.concatenate([o.columns["label_label"] for o in found]).astype(np.float64)
    weights, rare = np.ones(len(labels)), np.concatenate(counts)
    bounds = (*RARITY, np.inf)
    masks = [(rare >= low) & (rare < high) for low, high in pairwise(bounds)]
    slices = [log_loss(logits[m], labels[m], weights[m]) if m.any() else np.nan for m in masks]
    return Scores(auc(logits, labels, weights), normalized_entropy(logits, labels, weights), tuple(slices))


def rarest(part: Path, features: Sequence[str]) -> np.ndarray:
    """(rows of test,) how often the rarest id of a row occurs in train; id 0 does not count.

    Missing ids are 0, and on Criteo those that train does not have. Rows with such an id other than 0 get 0 and are in
    no slice: 347 of the 50,000 of lowrank.
    """
    train, test = (pq.read_table(part / f"{split}.parquet") for split in ("train", "test"))
    least = np.full(len(test), np.iinfo(np.int64).max)
    for name in features:
        ids = test[name].to_numpy()
        counts = np.bincount(train[name].to_numpy(), minlength=ids.max() + 1)
        least = np.minimum(least, np.where(ids == 0, least, counts[ids]))
    return least


def _trial(arm: Arm, rate: float, seed: int, part: Path, split: str = "test") -> Trial:
    card = real_data.card(arm.set, arm.model)
    config = load(str(card))
    batch = real_data.RANKS * config.data.batch_size  # the cards are for 2 ranks, a trial has one
    overrides = [f"model.dim={arm.d}", f"optim.tables.lr={rate}", f"run.seed={seed}", f"data.batch_size={batch}"]
    overrides += [f"embeddings.inner_dim={arm.k}"] if arm.k != PLAIN else []
    # fused kernels need widths that are multiples of 4; data-parallel tables train alike, only slower
    sets = replace(config.model, dim=arm.d).table_sets(config.schema)
    tables = make_tables(sets, config.schema, replace(config.embeddings, inner_dim=arm.k or None))
    overrides += [f"embeddings.tables.{t.name}.sharding=data_parallel" for t in tables if t.width % 4]
    return Trial(card, tuple(overrides), part, split)


def _parts(name: str, data: Path, folder: Path) -> list[Path]:
    if name == "lowrank":
        write_lowrank(folder)
        return [folder]
    if all((folder / f"fold{i}/test.parquet").exists() for i in range(5)):  # a trial is named after the files' times
        return [folder / f"fold{i}" for i in range(5)]
    return real_data.prepare(name, data, folder)


def write_lowrank(folder: Path, sizes: dict[str, int] = LOWRANK) -> None:
    """Four id columns (Zipf 1.05) whose ids lie on a planted low-rank structure, and a click.

    Feature f gives id i the latent vector z_fi = A_f b_fi with b_fi in R^rank standard normal and A_f an orthonormal
    basis of rank columns in R^16; the logit is the sum over pairs f < g of <z_fi, M_fg z_gj> / sqrt(rank), with a
    random M_fg, minus 1. A table of width >= rank could hold it exactly. Rare ids are learned from few rows: only what
    categories share can help them.
    """
    if all((folder / f"{split}.parquet").exists() for split in SPLITS):
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(20261124)
    n, rank, width = sizes["ids"], sizes["rank"], 16
    latent = [rng.standard_normal((n, rank)) @ np.linalg.qr(rng.standard_normal((width, rank)))[0].T for _ in range(4)]
    mixing = {(f, g): rng.standard_normal((width, width)) for f in range(4) for g in range(f + 1, 4)}
    popularity = np.arange(1, n + 1) ** -1.05
    order = [rng.permutation(n) for _ in range(4)]
    for split in SPLITS:
        rows = sizes[split]
        ids = [order[f][rng.choice(n, rows, p=popularity / popularity.sum())] for f in range(4)]
        logit = np.full(rows, -1.0)
        for (f, g), m in mixing.items():
            logit += np.einsum("bi,ij,bj->b", latent[f][ids[f]], m, latent[g][ids[g]]) / rank**0.5
        label = (rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.float32)
        columns = {"label": label, **{f"c{f}": ids[f] + 1 for f in range(4)}}
        pq.write_table(pa.table(columns), folder / f"{split}.parquet", row_group_size=real_data.ROW_GROUP_ROWS)
        if split == "test":
            best = auc(logit, label.astype(np.float64), np.ones(rows))
            print(f"lowrank: AUC of the true logit on test {best:.4f}")


def report(arms: list[Arm], results: dict[Arm, list[Scores]], rates: dict[int, float]) -> Iterator[str]:
    """The tables of one set and model, as Markdown."""
    name, model = arms[0].set, arms[0].model
    chosen = ", ".join(f"{'plain' if k == PLAIN else f'k = {k}'}: {rate}" for k, rate in rates.items())
    yield f"\n## {name}, {model}: {len(results[arms[0]])} seeds; learning rate of the tables {chosen}\n"
    slices = "log loss - plain, rarest id seen 1-2 | 3-10 | 11-100 | > 100"
    yield f"| d | k | AUC | NE | AUC - plain | NE - plain | {slices} |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for arm in arms:
        mine, plain = results[arm], results[arm._replace(k=PLAIN)]
        cells = [_words([s.auc for s in mine]), _words([s.ne for s in mine])]
        if arm.k == PLAIN:
            cells += ["", "", *(_words([s.slices[i] for s in mine]) for i in range(len(RARITY)))]
        else:
            pairs = list(zip(mine, plain, strict=True))
            cells += [_words([a.auc - b.auc for a, b in pairs], sign=True)]
            cells += [_words([a.ne - b.ne for a, b in pairs], sign=True)]
            cells += [_words([a.slices[i] - b.slices[i] for a, b in pairs], sign=True) for i in range(len(RARITY))]
        yield f"| {arm.d} | {arm.k or 'plain'} | " + " | ".join(cells) + " |"
    yield ""
    yield from reduction(arms, results)


def reduction(arms: list[Arm], results: dict[Arm, list[Scores]]) -> Iterator[str]:
    """For every plain width: the smallest served width at which MLET has no higher mean NE, for each k."""
    mean = {arm: float(np.mean([s.ne for s in results[arm]])) for arm in arms}
    dims = sorted({arm.d for arm in arms})
    for k in sorted({arm.k for arm in arms} - {PLAIN}):
        factors = []
        for d in dims:
            plain = mean[arms[0]._replace(d=d, k=PLAIN)]
            equal = [e for e in dims if (a := arms[0]._replace(d=e, k=k)) in mean and mean[a] <= plain]
            factors.append(f"{d} -> {min(equal)} ({d / min(equal):g} x)" if equal else f"{d} -> none")
        yield f"served width of plain -> of MLET(k = {k}) at no higher NE: {', '.join(factors)}"


def _words(values: Sequence[float], sign: bool = False) -> str:
    mean, half = interval(values)
    return f"{mean:{'+' if sign else ''}.4f} ± {half:.4f}"


if __name__ == "__main__":
    main()
