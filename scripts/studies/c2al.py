"""What C2AL does to NE, overall and in its two cohorts, against the model without heads and against four baselines.

    .venv/bin/python -m scripts.studies.c2al [--cases ...] [--models dhen dcn] [--lambdas 0.01 0.03 0.1 0.3 1]
                                             [--baselines ...] [--seeds 0 1 ... 9] [--processes 2] [--work .data/c2al]

For every case and model: trains the experiment card configs/<set>/<model>.yaml once with a seed of its own, finds the
cohorts with `dist-rec cohorts` on its training rows, then trains every arm with every seed, and prints Markdown tables
of ``NE_diff = NE / NE_plain - 1`` in percent. A trial is kept under --work and not repeated.

Cases (axis of the cohorts; the protocol of the splits is that of `real_data.py`):

- ml100k-age, ml100k-occupation: MovieLens in the order of time; the axis is a feature of the model too.
- criteo1tb_80k: five folds, whose predictions are pooled; the cohorts are those of the first fold. Criteo has no users;
  the axis is the *activity* of the value in c20, the feature with most ids: in how many other training rows it occurs,
  cut at deciles (equal counts stay together).
- synthetic, synthetic-known: the log with planted cohorts (`dist_rec/data/synthetic_cohorts.py`), cut by `segment`,
  which the model does not see, or sees as a feature.

Arms: plain; c2al with each lambda for both heads; random, heads of random cohorts of the same share of users, or of
rows where there are no users, other ones for each seed; reweighted, where rows of both cohorts count twice; group_dro;
pcgrad.

Each figure has two 95 % half-widths: over seeds (Student's t, paired by seed: what other trainings would change), and
over test rows (normal, of the paired differences of losses, mean over seeds: what other test rows would change; a
user's rows are not independent, so their sum is one observation).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dist_rec.config import load
from dist_rec.data import cohorts, synthetic
from dist_rec.metrics.binary import auc, normalized_entropy
from scripts.studies import real_data
from scripts.studies.trials import SPLITS, Outcome, Trial, interval, outcomes

LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0)
BASELINES = ("random", "reweighted", "group_dro", "pcgrad")
DISCOVERY_SEED = 1000
ACTIVITY_OF = "c20"


class Case(NamedTuple):
    """A data set and an axis.

    Attributes:
        set: its folder of cards. axis: for `dist-rec cohorts`. groups: group of the schema -> column.
        random: the group whose values are drawn for random cohorts, and whose rows are one observation of an interval.
        least: smallest share of the rows of a cohort, and smallest number of positive rows.
        overrides: settings of every training.
    """

    set: str
    axis: str
    groups: dict[str, str]
    random: str
    least: tuple[float, int]
    overrides: tuple[str, ...] = ()


_ML100K = {"user": "user_id", "age": "age", "occupation": "occupation"}
_SYNTHETIC = Case("synthetic_cohorts", "segment", {}, "user", (0.03, 500))
CASES = {
    "ml100k-age": Case("ml100k", "age", _ML100K, "user", (0.02, 1000)),
    "ml100k-occupation": Case("ml100k", "occupation", _ML100K, "user", (0.02, 1000)),
    "criteo1tb_80k": Case("criteo1tb_80k", "activity:10", {"activity": "activity", "row": "row"}, "row", (0.02, 50)),
    "synthetic": _SYNTHETIC,
    "synthetic-known": _SYNTHETIC._replace(overrides=("schema.sparse.segment.num_ids=20",)),
}


class Arm(NamedTuple):
    """A row of a table; factor: lambda, None where there is none."""

    name: str
    factor: float | None = None


PLAIN = Arm("plain")


class Scores(NamedTuple):
    """Figures of one seed on the pooled test rows: of all rows, the head and the tail. losses, units: of their rows."""

    ne: list[float]
    auc: list[float]
    losses: list[np.ndarray]
    units: list[np.ndarray]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, prepares, finds cohorts, trains the arms and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=real_data.ROOT.parent / "shared/data")
    parser.add_argument("--work", type=Path, default=real_data.ROOT / ".data/c2al")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--models", nargs="+", choices=("dhen", "dcn"), default=["dhen", "dcn"])
    parser.add_argument("--lambdas", nargs="+", type=float, default=list(LAMBDAS))
    parser.add_argument("--random-lambdas", nargs="*", type=float, help="of random heads; default: --lambdas")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(10)))
    parser.add_argument("--folds", type=int, default=5, help="of criteo1tb_80k that are trained")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--overrides", nargs="+", metavar="key=value", default=[], help="settings of every training")
    args = parser.parse_args(arguments)
    work = args.work.absolute()
    prepared = {name: prepare(name, args.data, work)[: args.folds] for name in args.cases}
    for name, parts in prepared.items():
        for model in args.models:
            case = CASES[name]._replace(overrides=(*CASES[name].overrides, *args.overrides))
            found = discover(case, model, parts[0], work / "discovery" / f"{name}-{model}")
            arms = list(_arms(args.lambdas, args.random_lambdas, args.baselines))
            results = train(case, model, found, arms, args.seeds, parts, work, args.processes)
            print("\n".join(report(f"{name}, {model}", found, results)), flush=True)


def _arms(lambdas: Sequence[float], random: Sequence[float] | None, baselines: Sequence[str]) -> Iterator[Arm]:
    yield PLAIN
    yield from (Arm("c2al", factor) for factor in lambdas)
    if "random" in baselines:
        yield from (Arm("random", factor) for factor in (lambdas if random is None else random))
    yield from (Arm(name) for name in baselines if name != "random")


def prepare(name: str, data: Path, work: Path) -> list[Path]:
    """Writes the splits of a case, if that has not been done; returns the folders with train, validation and test."""
    folder = work / CASES[name].set
    if CASES[name].set == "synthetic_cohorts":
        return [_write_synthetic(folder)]
    single = [folder / "all"] if CASES[name].set == "ml100k" else [folder / f"fold{i}" for i in range(5)]
    done = folder / "done"  # a trial is named after its files' times
    if not done.exists():
        parts = real_data.prepare(CASES[name].set, data, folder)
        if CASES[name].set == "criteo1tb_80k":
            for part in parts:
                add_activity(part)
        done.touch()
    return single


def _write_synthetic(folder: Path) -> Path:
    """The rows of the card's log, a file for each split."""
    config = load(str(real_data.card("synthetic_cohorts", "dhen")), [f"data.synthetic.path={folder / 'log'}"])
    assert config.data.synthetic is not None
    synthetic.write(config.data.synthetic)
    for split in SPLITS:
        if not (path := folder / f"{split}.parquet").exists():
            pq.write_table(pq.read_table(folder / "log" / split), path, row_group_size=real_data.ROW_GROUP_ROWS)
    return folder


def add_activity(part: Path) -> None:
    """Adds to every split: activity, in how many training rows besides itself a row's id occurs; row, a number."""
    tables = {split: pq.read_table(part / f"{split}.parquet") for split in SPLITS}
    counts = np.bincount(tables["train"][ACTIVITY_OF].to_numpy())
    first = 0
    for split, table in tables.items():
        ids = table[ACTIVITY_OF].to_numpy()
        # 0 stands for every id that is missing, or unseen in train: no other id lies beyond the counts
        activity = np.where(ids == 0, 0, counts[ids] - (split == "train"))
        table = table.append_column("activity", pa.array(activity))
        table = table.append_column("row", pa.array(np.arange(first, first + len(table))))
        first += len(table)
        pq.write_table(table, part / f"{split}.parquet", row_group_size=real_data.ROW_GROUP_ROWS)


def discover(case: Case, model: str, part: Path, folder: Path) -> dict[str, Any]:
    """What `dist-rec cohorts` writes about a plain run of the model, on its training rows."""
    shutil.rmtree(folder, ignore_errors=True)
    overrides = [*_overrides(case, model, DISCOVERY_SEED, PLAIN, None), f"run.dir={folder}"]
    overrides += [f"data.{split}={part / split}.parquet" for split in SPLITS]
    _entry("dist_rec.train", str(real_data.card(case.set, model)), *overrides, log=folder / "train.log")
    least = [f"min_mass={case.least[0]}", f"min_positives={case.least[1]}"]
    data = str(part / "train.parquet")
    _entry("dist_rec.cohorts", str(folder), data, f"axes={case.axis}", *least, log=folder / "cohorts.log")
    return json.loads((folder / "cohorts.json").read_text())


def _entry(module: str, *arguments: str, log: Path) -> None:
    """Runs an entry on one rank; its output goes to `log`, and is shown if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        command, env = [sys.executable, "-m", module, *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=real_data.ROOT, env=env, stdout=out, stderr=out)
    if done.returncode:
        raise SystemExit(f"error: {module} ended with {done.returncode}; the end of {log}:\n{log.read_text()[-4000:]}")


def _overrides(case: Case, model: str, seed: int, arm: Arm, found: dict[str, Any] | None) -> list[str]:
    """The settings of a trial on top of its card."""
    batch = real_data.RANKS * load(str(real_data.card(case.set, model))).data.batch_size  # the cards are for 2 ranks
    result = [f"data.batch_size={batch}", f"run.seed={seed}", "run.device=cpu", "report.tensorboard=false"]
    result += [f"schema.groups.{group}.column={column}" for group, column in case.groups.items()] + [*case.overrides]
    if arm.name in ("c2al", "random"):
        result += [f"auxiliary.c2al.lambda_{end}={arm.factor}" for end in ("head", "tail")]
        result += [f"auxiliary.c2al.cohorts={_definition(found)}"]
        if arm.name == "random":  # other cohorts for each seed: one draw may happen to be a good one
            result += [f"auxiliary.c2al.random.group={case.random}", f"auxiliary.c2al.random.seed={seed}"]
    elif arm != PLAIN:
        result += [f"objective.name={arm.name}", f"objective.cohorts={_definition(found)}"]
    return result


def _definition(found: dict[str, Any] | None) -> str:
    """The cohorts themselves and not the path of their file: a trial's name changes with them."""
    assert found is not None
    keys = ("axes", "edges", "head", "tail", "head_rate", "tail_rate", "head_mass", "tail_mass", "label")
    return json.dumps({key: found[key] for key in keys})


def train(
    case: Case,
    model: str,
    found: dict[str, Any],
    arms: Sequence[Arm],
    seeds: Sequence[int],
    parts: Sequence[Path],
    work: Path,
    processes: int,
) -> dict[Arm, list[Scores]]:
    """The scores of every arm, a seed each; a seed's predictions of all parts are pooled."""
    card = real_data.card(case.set, model)
    places = [(seed, arm) for seed in seeds for arm in arms]
    trials = [
        Trial(card, tuple(_overrides(case, model, seed, arm, found)), part) for seed, arm in places for part in parts
    ]
    done = outcomes(trials, work, processes)
    members = cohorts.Cohorts(**json.loads(_definition(found)))
    results: dict[Arm, list[Scores]] = {arm: [] for arm in arms}
    for _, arm in places:
        results[arm].append(scores([next(done) for _ in parts], members, case.random))
    return results


def scores(found: Sequence[Outcome], members: cohorts.Cohorts, unit: str) -> Scores:
    """Figures of the pooled predictions of all parts; unit: the group whose rows are not independent in a part."""
    columns = {name: np.concatenate([o.columns[name] for o in found]) for name in found[0].columns}
    z, y = columns["logit_label"].astype(np.float64), columns["label_label"].astype(np.float64)
    masks = members.masks({name: torch.from_numpy(columns[name]) for name in members.axes})
    loss = y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
    part = np.repeat(np.arange(len(found)), [len(o.columns[unit]) for o in found])
    units = part * len(y) + np.unique(columns[unit], return_inverse=True)[1]
    result = Scores([], [], [], [])
    for here in (np.ones(len(y), bool), masks.head.numpy(), masks.tail.numpy()):
        weights = np.ones(here.sum())
        result.ne.append(normalized_entropy(z[here], y[here], weights))
        result.auc.append(auc(z[here], y[here], weights))
        result.losses.append(loss[here])
        result.units.append(units[here])
    return result


def report(title: str, found: dict[str, Any], results: dict[Arm, list[Scores]]) -> Iterator[str]:
    """The tables of one case and model, as Markdown."""
    plain = results[PLAIN]
    measure, value = found["divergence"]["measure"], found["divergence"]["of_head_and_tail"]
    yield f"\n## {title}: {len(plain)} seeds\n"
    yield f"axes {', '.join(found['axes'])}; divergence of head and tail ({measure}) {value}\n"
    yield "| cohort | cell | mass | positive rate | test rows | plain NE | plain AUC |"
    yield "|---|---|---|---|---|---|---|"
    for i, name in enumerate(("all", "head", "tail")):
        mass, rate = (
            (found[f"{name}_{kind}"] for kind in ("mass", "rate")) if i else (1, found["positives"] / found["rows"])
        )
        cells = [f"{interval([getattr(s, kind)[i] for s in plain])[0]:.4f}" for kind in ("ne", "auc")]
        cell = ", ".join(f"{axis} {cell}" for axis, cell in found.get(name, {}).items())
        rows = f"{len(plain[0].losses[i]):,}"
        yield f"| {name} | {cell} | {mass:.3f} | {rate / mass:.4f} | {rows} | {' | '.join(cells)} |"
    yield "\nNE_diff in %, ± over seeds ± over test rows (95 %); negative is better\n"
    yield "| arm | lambda | all | head | tail |"
    yield "|---|---|---|---|---|"
    for arm, mine in results.items():
        if arm != PLAIN:
            cells = [_words(difference(mine, plain, i)) for i in range(3)]
            yield f"| {arm.name} | {'' if arm.factor is None else f'{arm.factor:g}'} | {' | '.join(cells)} |"


def difference(mine: Sequence[Scores], plain: Sequence[Scores], i: int) -> tuple[float, float, float]:
    """NE_diff in percent with its half-widths over seeds and over rows; i: 0 all rows, 1 head, 2 tail."""
    mean, seeds = interval([100 * (a.ne[i] / b.ne[i] - 1) for a, b in zip(mine, plain, strict=True)])
    change = np.mean([a.losses[i] - b.losses[i] for a, b in zip(mine, plain, strict=True)], axis=0)
    base = np.mean([b.losses[i].mean() for b in plain])
    of_units = np.bincount(np.unique(plain[0].units[i], return_inverse=True)[1], change - change.mean())
    return mean, seeds, float(100 * 1.96 * of_units.std(ddof=1) * len(of_units) ** 0.5 / len(change) / base)


def _words(figures: tuple[float, float, float]) -> str:
    return f"{figures[0]:+.3f} ± {figures[1]:.3f} ± {figures[2]:.3f}"


if __name__ == "__main__":
    main()
