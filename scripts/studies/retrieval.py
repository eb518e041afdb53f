"""What self-supervised item losses do to two towers: Recall@10, Recall@50 and MAP@10, overall and by slice of items.

    .venv/bin/python -m scripts.studies.retrieval [--sets beauty toys squirrel] [--models two_tower history]
        [--arms popularity item_knn two_tower so rfm cfm] [--shares 1 0.1] [--seeds 0 1 2 3 4] [--processes 2]
        [--alphas 0.1 0.3 1 3] [--weights 0.01 0.03 0.1 0.3 1] [--dropouts 0.3 0.1 0.5] [--work .data/retrieval]
        [--overrides key=value ...]

For every set, card configs/<folder>/<model>.yaml and share of the training rows: chooses on the validation rows, with a
seed of its own, the weight of each arm's loss (--alphas of the contrastive ones, --weights of spread-out
regularisation) and then, at that weight, the share of the ids that a view drops;
trains every arm with every seed, early stopping on validation rows; and prints Markdown tables of the best checkpoints'
figures on the test rows, and of their differences to the two towers without an item loss, paired by seed. A trial is
kept under --work and not repeated. Intervals are over seeds (95 %, Student's t) and do not hold for other test rows;
a seed draws the model and the order of rows, not the data.

Arms: popularity and item-kNN (see `retrieval_data.py`, also for the sets and splits); two_tower, the card as it is; so,
rfm and cfm, the card with spread-out regularisation, with the contrastive loss under random and under correlated
feature masking. Nothing but that weight and the dropout is tuned for an arm, on one seed; beyond an optimum at an end
of its grid there may be a better one. With a share below 1, a training has as many epochs more as it has rows fewer,
and validates more often in proportion to the share's root.

squirrel is the negative control: what is known of its pages adds nothing to their ids.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import yaml

from dist_rec import correlation
from dist_rec.config import load, read
from dist_rec.metrics.retrieval import SLICES
from scripts.studies import retrieval_data
from scripts.studies.real_data import ROOT, card
from scripts.studies.retrieval_data import SETS
from scripts.studies.trials import SPLITS, Outcome, Trial, interval, outcomes

CARDS = {"beauty": "s3rec_amazon", "toys": "s3rec_amazon", "squirrel": "musae_wiki"}
MODELS = ("two_tower", "history")
BASELINES = ("popularity", "item_knn")
PLAIN = "two_tower"
ARMS = (*BASELINES, PLAIN, "so", "rfm", "cfm")
NAMES = {"recall@10": "Recall@10", "recall@50": "Recall@50", "map@10": "MAP@10"}
METRICS = tuple(NAMES)
COLUMNS = ("", *(f"/slice={name}" for name in SLICES))
CHOSEN_BY = "recall@50"
TUNING_SEED = 1000
Scores = np.ndarray
"""(seeds, METRICS, COLUMNS)."""


class Case(NamedTuple):
    """A set, a card for it, and the share of the training rows that are there."""

    set: str
    model: str
    share: float


class Setting(NamedTuple):
    """alpha: weight of the item loss. dropout: probability that a view drops an id; None where there are no views."""

    alpha: float
    dropout: float | None = None


class Job(NamedTuple):
    """One training; setting: None of the plain model."""

    case: Case
    arm: str
    setting: Setting | None
    seed: int
    split: str = "test"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, prepares, tunes, trains and prints the tables."""
    args = _parsed(arguments)
    work = args.work.absolute()
    cases = [
        Case(name, model, share)
        for name in args.sets for model in args.models for share in args.shares
        if card(CARDS[name], model).is_file()
    ]  # fmt: skip
    parts = {case: prepare(case, args.data, work) for case in cases}
    for case, part in parts.items():  # a mistake in --overrides is found before anything is trained
        load(str(card(CARDS[case.set], case.model)), _overrides(case, part, args.overrides))
    trained = [arm for arm in args.arms if arm not in BASELINES]

    def run(jobs: Sequence[Job]) -> list[Outcome]:
        return train(jobs, parts, work, args.overrides, args.processes)

    grids = {arm: args.weights if arm == "so" else args.alphas for arm in trained if arm != PLAIN}
    chosen = tune(run, cases, grids, args.dropouts)
    jobs = [Job(case, arm, chosen.get((case, arm)), s) for s in args.seeds for case in cases for arm in trained]
    found: dict[Case, dict[str, list[Mapping[str, float]]]] = {case: {} for case in cases}
    for job, outcome in zip(jobs, run(jobs), strict=True):
        found[job.case].setdefault(job.arm, []).append(outcome.metrics)
    for case in cases:
        figures = _baselines(case, parts[case], args.arms) | {a: scores(each) for a, each in found[case].items()}
        settings = {arm: setting for (where, arm), setting in chosen.items() if where == case}
        print("\n".join(report(case, _rows(parts[case], case), settings, figures)), flush=True)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=ROOT / ".data/retrieval", help="where splits and trials go")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="squirrel has no history")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--shares", nargs="+", type=float, default=[1.0, 0.1], help="of the training rows")
    parser.add_argument("--alphas", nargs="+", type=float, default=[0.1, 0.3, 1.0, 3.0], help="of rfm and cfm")
    parser.add_argument("--weights", nargs="+", type=float, default=[0.01, 0.03, 0.1, 0.3, 1.0], help="of arm so")
    parser.add_argument(
        "--dropouts", nargs="+", type=float, default=[0.3, 0.1, 0.5], help="alpha is chosen at the first"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--overrides", nargs="+", metavar="key=value", default=[], help="settings of every training")
    return parser.parse_args(arguments)


def prepare(case: Case, data: Path, work: Path) -> Path:
    """The folder with the splits, items.parquet and correlation.yaml, which are written if they are not there."""
    folder = work / (case.set if case.share == 1 else f"{case.set}-{case.share:g}")
    out = folder / "correlation.yaml"
    if not out.exists():  # written last: a trial is named after its files' times
        source = data / SETS[case.set].interactions
        if not source.is_file():
            raise SystemExit(f"error: {source} does not exist; give the folder of the data sets with --data")
        retrieval_data.prepare(case.set, data, folder, case.share)
        correlation.run(str(folder / "items.parquet"), str(out), SETS[case.set].item)
    return folder


def tune(
    run: Callable[[Sequence[Job]], list[Outcome]],
    cases: Sequence[Case],
    grids: Mapping[str, Sequence[float]],
    dropouts: Sequence[float],
) -> dict[tuple[Case, str], Setting]:
    """(case, arm) -> the setting that is best on the validation rows: weight at the first dropout, then dropout.

    grids: arm -> the weights of its loss that are tried.
    """
    first = {
        (case, arm): [Setting(alpha, None if arm == "so" else dropouts[0]) for alpha in alphas]
        for case in cases for arm, alphas in grids.items()
    }  # fmt: skip
    chosen = _best(run, first)
    second = {
        place: [setting] if setting.dropout is None else [setting._replace(dropout=d) for d in dropouts]
        for place, setting in chosen.items()
    }
    return _best(run, second)


def _best(
    run: Callable[[Sequence[Job]], list[Outcome]], options: Mapping[tuple[Case, str], Sequence[Setting]]
) -> dict[tuple[Case, str], Setting]:
    """The best of each place's options; of equal ones the first. A single one is not tried."""
    jobs = [
        Job(case, arm, setting, TUNING_SEED, "validation")
        for (case, arm), settings in options.items() if len(settings) > 1 for setting in settings
    ]  # fmt: skip
    figures = {job: outcome.metrics[CHOSEN_BY] for job, outcome in zip(jobs, run(jobs), strict=True)} if jobs else {}
    return {
        place: max(settings, key=lambda s: figures.get(Job(*place, s, TUNING_SEED, "validation"), 0.0))
        for place, settings in options.items()
    }


def auxiliary(arm: str, setting: Setting | None, information: Mapping[str, Any], temperature: float) -> dict[str, Any]:
    """The section `auxiliary` of an arm. information: of the item table's columns, for cfm. temperature: both losses
    have the same, as in the paper."""
    if setting is None:
        return {}
    if arm == "so":
        return {"spread_out": {"weight": setting.alpha}}
    views = {"masking": arm, "alpha": setting.alpha, "value_dropout": setting.dropout, "temperature": temperature}
    return {"contrastive": {**views, "correlation": information} if arm == "cfm" else views}


def train(
    jobs: Sequence[Job], parts: Mapping[Case, Path], work: Path, overrides: Sequence[str], processes: int
) -> list[Outcome]:
    """The outcome of every job, in their order; says how each went."""
    folder = work / "cards"
    folder.mkdir(parents=True, exist_ok=True)
    trials = []
    for job in jobs:
        part = parts[job.case]
        values = read(str(card(CARDS[job.case.set], job.case.model)))
        information = yaml.safe_load((part / "correlation.yaml").read_text())["auxiliary"]["contrastive"]["correlation"]
        temperature = values["objective"]["temperature"]
        values["auxiliary"] = auxiliary(job.arm, job.setting, information, temperature)
        words = [job.case.set, job.case.model, f"{job.case.share:g}", job.arm, *(job.setting or ())]
        path = folder / ("-".join(map(str, words)) + ".yaml")
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        own = [f"run.seed={job.seed}", *_overrides(job.case, part, overrides)]
        trials.append(Trial(path, tuple(own), part, job.split))
    found = []
    for job, outcome in zip(jobs, outcomes(trials, work, processes), strict=True):
        figures = ", ".join(f"{name} {outcome.metrics[name]:.4f}" for name in METRICS)
        setting = "" if job.setting is None else f" {tuple(x for x in job.setting if x is not None)}"
        seconds, case = outcome.result["wall_seconds"], f"{job.case.set}, {job.case.model}, {job.case.share:g}"
        print(f"{case}, {job.arm}{setting}, seed {job.seed}, {job.split}: {figures}; {seconds:.0f} s", flush=True)
        found.append(outcome)
    return found


def _overrides(case: Case, part: Path, overrides: Sequence[str]) -> list[str]:
    """Where the data lies, and the length of the training for the share of its rows."""
    values = read(str(card(CARDS[case.set], case.model)))["train"]
    length = [
        f"train.epochs={round(values['epochs'] / case.share)}",
        f"train.eval_every={max(1, round(values['eval_every'] * case.share**0.5))}",
    ]
    files = [f"data.{split}={part / split}.parquet" for split in SPLITS]
    return [*files, f"data.items={part / 'items.parquet'}", f"data.cache={part / 'cache'}", *length, *overrides]


def _baselines(case: Case, part: Path, arms: Sequence[str]) -> dict[str, Scores]:
    wanted = [arm for arm in BASELINES if arm in arms]
    if not wanted:
        return {}
    config = load(str(card(CARDS[case.set], case.model)), _overrides(case, part, ())).metrics.retrieval
    found = retrieval_data.baselines(case.set, part, config)
    return {arm: scores([found[arm].metrics]) for arm in wanted}


def scores(metrics: Sequence[Mapping[str, float]]) -> Scores:
    """The figures that are reported, of some evaluations; nan for a slice without rows, of which JSON says null."""
    return np.array([[[found[n + column] for column in COLUMNS] for n in METRICS] for found in metrics], np.float64)


def _rows(part: Path, case: Case) -> list[int]:
    """The test rows, and those of them whose item is in each slice."""
    which = SETS[case.set]
    train, test = (
        pq.read_table(part / f"{s}.parquet", columns=[which.item])[which.item].to_numpy() for s in ("train", "test")
    )
    catalogue = pq.read_table(part / "items.parquet", columns=[which.item])[which.item].to_numpy()
    frequency = np.bincount(train, minlength=int(catalogue.max()) + 1)
    head = load(str(card(CARDS[case.set], case.model)), _overrides(case, part, ())).metrics.retrieval.head
    slices = retrieval_data.frequency_slices(frequency, catalogue, head)[test]
    return [len(test), *np.bincount(slices, minlength=len(SLICES)).tolist()]


def report(
    case: Case, rows: Sequence[int], settings: Mapping[str, Setting], found: Mapping[str, Scores]
) -> Iterator[str]:
    """The tables of one case as Markdown. rows: of the test split, all and by slice; found: arm -> scores."""
    seeds = max(len(s) for s in found.values())
    yield f"\n## {case.set}, {case.model}, {case.share:.0%} of the training rows; seeds: {seeds}\n"
    chosen = [f"{arm} weight {s.alpha:g}" if s.dropout is None else f"{arm} alpha {s.alpha:g}, dropout {s.dropout:g}"
              for arm, s in settings.items()]  # fmt: skip
    yield f"on validation: {'; '.join(chosen) or 'nothing was chosen'}"
    heads = [f"{name}: {count:,}" for name, count in zip(("all", *SLICES), rows, strict=True)]
    for i, metric in enumerate(METRICS):
        yield from _table(NAMES[metric], heads, {arm: s[:, i] for arm, s in found.items()})
        place = {"recall@10": 0, "recall@50": 1}.get(metric)
        if place is not None and case.share == 1:
            for name, figures in SETS[case.set].reference.items():
                yield f"| *{name}, untuned, of the data's README* | {figures[place]:.3f} |" + " |" * len(SLICES)
        if PLAIN in found:
            pairs = {a: s[:, i] - found[PLAIN][:, i] for a, s in found.items() if a not in (*BASELINES, PLAIN)}
            base = found[PLAIN][:, i].mean(axis=0)
            if pairs:
                yield from _table(f"{NAMES[metric]} - {PLAIN}", heads, pairs, base)


def _table(
    what: str, heads: Sequence[str], found: Mapping[str, np.ndarray], base: np.ndarray | None = None
) -> Iterator[str]:
    """found: arm -> (seeds, columns). base: what differences are also given in percent of."""
    yield f"\n| {what} | " + " | ".join(heads) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    for arm, figures in found.items():
        cells = []
        for column, values in enumerate(figures.T):
            mean, half = interval(values.tolist())
            cell = f"{mean:{'' if base is None else '+'}.4f}" + ("" if np.isnan(half) else f" ± {half:.4f}")
            share = "" if base is None or not base[column] else f" ({mean / base[column]:+.1%})"
            cells.append("" if np.isnan(mean) else cell + share)
        yield f"| {arm} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
