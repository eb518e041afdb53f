"""Quality of the multi-domain models: AUC, AUC by user and NE, of all rows and of each domain, with intervals.

    .venv/bin/python -m scripts.studies.multi_domain [--sets yelp_hin ml100k_genres synthetic_domains] [--seeds 0 1 ...]
                     [--arms shared_bottom ple crocodile ...] [--processes 2] [--work .data] [--overrides key=value ...]

For every set: trains the card configs/<set>/crocodile.yaml and, with the same data, optimisers, loss per domain and
widths of layers, every other model, the ablations of Crocodile and a sweep of alpha; early stopping on validation rows;
scores of the best checkpoint on the test rows. Nothing is tuned for a model alone. A trial is kept under --work and not
repeated. A seed draws the model and the order of rows, not the data: intervals are over seeds (95 %, Student's t) and
do not hold for other test rows.

yelp_hin: cities as domains, split at random; ml100k_genres: kinds of films, split in time (`genre_domains`); both as in
`real_data.py`, and neither a log of clicks. On yelp_hin, AUC by user leaves out users that were not seen in training,
who all have id 0 there. synthetic_domains: five domains, 13:1, with planted shared and own interests, 1,000,000 test
rows, and the scores of the planted log-odds themselves, which no model beats but by luck.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from dist_rec.config import RunConfig, load, read
from dist_rec.data import synthetic
from dist_rec.metrics.binary import auc, grouped_auc, normalized_entropy
from scripts.studies import real_data
from scripts.studies.real_data import ROOT, ROW_GROUP_ROWS, SETS, card
from scripts.studies.trials import SPLITS, Outcome, Trial, interval, outcomes

NAMES = ("yelp_hin", "ml100k_genres", "synthetic_domains")
METRICS = ("AUC", "AUC by user", "NE")
GENRES = 7  # the most frequent ones are domains, all others together are one more
ALPHAS = (0.008, 0.8, 8.0)  # beside the card's
TEST_ROWS, VALIDATION_ROWS = 1_000_000, 100_000  # of synthetic_domains: one row in 64 is of the smallest domain
Scores = np.ndarray
"""(1 + domains, METRICS): all rows, then each domain."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments, prepares, trains and prints the tables of each set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared/data", help="folder of the data sets")
    parser.add_argument("--work", type=Path, default=ROOT / ".data", help="where splits and trials go")
    parser.add_argument("--sets", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--arms", nargs="+", help="default: all; see `arms`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--overrides", nargs="+", metavar="key=value", default=[], help="settings of every training")
    args = parser.parse_args(arguments)
    work = args.work.absolute()
    for name in args.sets:
        config = load(str(card(name, "crocodile")))
        part = prepare(name, config, args.data, work / name)
        found = arms(read(str(card(name, "crocodile"))))
        unknown = set(args.arms or ()) - set(found)
        if unknown:
            raise SystemExit(f"error: no arm is called {sorted(unknown)[0]!r}; there are: {'; '.join(found)}")
        chosen = {arm: found[arm] for arm in args.arms or found}
        tested = train(name, chosen, args.seeds, part, work, args.overrides, args.processes)
        print("\n".join(report(name, part, config, tested)), flush=True)


def arms(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """name -> the sections that make it, from the card of Crocodile: models, then ablations, then alphas."""
    croc = values["model"]
    own = {key: croc[key] for key in ("dim", "dropout") if key in croc}
    routed = own | {key: croc[key] for key in ("towers", "domain") if key in croc}
    mixed, widths = {**routed, "experts": croc["experts"]}, [*croc["experts"], *croc["towers"]]
    *ids, domain = croc["prior"]
    # columns that an id has in all of Crocodile's tables, at most
    wide = croc["num_experts"] * croc["dim"] + croc["prior_dim"]
    gates = {"prior": ids, "domain_features": [domain], "prior_dim": croc["prior_dim"]}
    models: dict[str, dict[str, Any]] = {
        "shared_bottom": {**routed, "bottom": croc["experts"]},
        "shared_bottom, wide": {**routed, "bottom": croc["experts"], "dim": wide},
        "mmoe": {**mixed, "num_experts": 4},
        "ple": {**mixed, "levels": 2},
        "ple, 1 level": {**mixed, "levels": 1},  # the depth that me_ple has
        "star": {**own, "widths": widths, "auxiliary": croc["towers"]},
        "pepnet": {**own, **gates, "widths": widths},
        "stem": mixed,
        "me_mmoe": {**mixed, "num_experts": croc["num_experts"]},
        "me_ple": mixed,
    }
    result = {n: {"model": {"name": n.split(",")[0], **model}, "auxiliary": {}} for n, model in models.items()}
    loss = values["auxiliary"]["covariance"]
    result |= {
        "crocodile": {"model": croc, "auxiliary": {"covariance": loss}},
        "crocodile, 5 sets": {"model": {**croc, "num_experts": 5}, "auxiliary": {"covariance": loss}},
        "crocodile, one set": {"model": {**croc, "single_set": True}, "auxiliary": {"covariance": loss}},
        "crocodile, no PEG": {"model": {**croc, "prior": [], "gate": "expert"}, "auxiliary": {"covariance": loss}},
        "crocodile, no CovLoss": {"model": croc, "auxiliary": {}},
    }
    for alpha in ALPHAS:
        result[f"crocodile, alpha {alpha}"] = {"model": croc, "auxiliary": {"covariance": {**loss, "alpha": alpha}}}
    for sections in result.values():
        # what has experts is asked how much they repeat each other
        many = sections["model"]["name"] in ("mmoe", "me_mmoe", "stem", "crocodile")
        sections["metrics"] = {"correlation": ["expert_*"] if many else []}
    return result


def train(
    name: str,
    chosen: dict[str, dict[str, Any]],
    seeds: Sequence[int],
    part: Path,
    work: Path,
    overrides: Sequence[str],
    processes: int,
) -> dict[str, list[Outcome]]:
    """arm -> its outcomes on the test rows, one for each seed."""
    values = read(str(card(name, "crocodile")))
    folder = work / "cards"
    folder.mkdir(parents=True, exist_ok=True)
    cards = {}
    for i, (arm, sections) in enumerate(chosen.items()):
        cards[arm] = folder / f"{name}-{i}.yaml"
        metrics = {**values["metrics"], **sections["metrics"]}
        cards[arm].write_text(yaml.safe_dump({**values, **sections, "metrics": metrics}, sort_keys=False))
    places = [(seed, arm) for seed in seeds for arm in chosen]
    trials = [Trial(cards[arm], (f"run.seed={seed}", *overrides), part) for seed, arm in places]
    found: dict[str, list[Outcome]] = {arm: [] for arm in chosen}
    for (seed, arm), outcome in zip(places, outcomes(trials, work, processes), strict=True):
        found[arm].append(outcome)
        speed, seconds = outcome.result["examples_per_second"], outcome.result["wall_seconds"]
        print(f"{name}, {arm}, seed {seed}: NE {outcome.metrics['ne']:.4f}, {seconds:.0f} s, {speed:,.0f} examples/s")
    return found


def prepare(name: str, config: RunConfig, data: Path, folder: Path) -> Path:
    """The folder with train.parquet, validation.parquet and test.parquet, which are written if they are not there."""
    part = folder / "all"
    if all((part / f"{split}.parquet").exists() for split in SPLITS):
        return part
    if name == "synthetic_domains":
        assert config.data.synthetic is not None
        settings = config.data.synthetic
        settings.path, settings.eval_rows = str(folder / "written"), TEST_ROWS
        synthetic.write(settings)
        part.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            rows = pq.read_table(folder / "written" / split)
            if split == "validation":
                rows = rows.slice(0, VALIDATION_ROWS)
            pq.write_table(rows, part / f"{split}.parquet", row_group_size=ROW_GROUP_ROWS)
        return part
    file = data / SETS[name.removesuffix("_genres")].file
    if not file.is_file():
        raise SystemExit(f"error: {file} does not exist; give the folder of the data sets with --data")
    known = pq.read_schema(file).names
    rows = pq.read_table(file, columns=[c for c in config.schema.columns() if c in known])
    if name == "yelp_hin":
        return real_data.write_parts(rows, SETS[name].split, folder, config)[0]
    domains = genre_domains(rows["genres"].to_pylist(), len(rows) * 8 // 10)
    rows = rows.append_column("domain", pa.array(domains)).append_column("rater", rows["user_id"])
    return real_data.write_parts(rows, SETS["ml100k"].split, folder, config)[0]


def genre_domains(genres: list[list[int]], train_rows: int) -> list[int]:
    """Each row's domain: of the film's genres the rarest among the GENRES most frequent ones, GENRES if it has none.

    Frequencies are those of the first `train_rows` rows, so that a film has the same domain everywhere; domain 0 is the
    most frequent genre. The rarest, because nearly every film is a drama or a comedy beside what it is.
    """
    counts = Counter(genre for row in genres[:train_rows] for genre in row)
    place = {genre: i for i, (genre, _) in enumerate(counts.most_common(GENRES))}
    return [max((place[genre] for genre in row if genre in place), default=GENRES) for row in genres]


def scores(outcome: Outcome, num_domains: int, unseen_user: int | None) -> Scores:
    """Figures of a trial. unseen_user: the id of all users without training rows, who are then in no AUC by user."""
    z, y, w = (outcome.columns[key] for key in ("logit_label", "label_label", "weight"))
    user, domain = outcome.columns["user"], outcome.columns["domain"]
    known = w * (user != unseen_user) if unseen_user is not None else w
    result = []
    for here in [np.ones(len(z), bool), *(domain == s for s in range(num_domains))]:
        rows = z[here], y[here], w[here]
        by_user = grouped_auc(z[here], y[here], known[here], user[here])
        result.append([auc(*rows), by_user, normalized_entropy(*rows)])
    return np.array(result)


def report(name: str, part: Path, config: RunConfig, tested: dict[str, list[Outcome]]) -> Iterator[str]:
    """The tables of one set as Markdown: every metric, then its difference to Crocodile, paired by seed."""
    domains = config.schema.num_values("domain")
    unseen = 0 if name == "yelp_hin" else None
    found = {arm: np.stack([scores(o, domains, unseen) for o in each]) for arm, each in tested.items()}
    rows = [np.bincount(pq.read_table(part / f"{s}.parquet")["domain"].to_numpy(), minlength=domains) for s in SPLITS]
    heads = ["all", *(f"{s}: {rows[0][s]:,} / {rows[2][s]:,}" for s in range(domains))]
    seeds = len(next(iter(tested.values())))
    yield f"\n## {name}: {seeds} seeds; domains with their rows in train / test\n"
    truth = part.parent / "written" / "truth.json"
    for i, metric in enumerate(METRICS):
        yield from _table(f"{metric}", heads, {arm: s[:, :, i] for arm, s in found.items()})
        if truth.exists() and metric != "AUC by user":
            best = json.loads(truth.read_text())["test"]
            cells = [best[key][metric.lower()] for key in ("all", *map(str, range(domains)))]
            yield "| *planted log-odds* | " + " | ".join(f"{cell:.4f}" for cell in cells) + " |"
        if "crocodile" in found and len(found) > 1:
            others = {arm: (s - found["crocodile"])[:, :, i] for arm, s in found.items() if arm != "crocodile"}
            yield from _table(f"{metric} - crocodile", heads, others, sign=True)
    alike = {arm: [o.diagnostics["correlation"] for o in each] for arm, each in tested.items() if each[0].diagnostics}
    if alike:
        yield from _table(
            "absolute correlation of experts", ["mean"], {arm: np.array(c)[:, None] for arm, c in alike.items()}
        )


def _table(what: str, heads: list[str], found: dict[str, np.ndarray], sign: bool = False) -> Iterator[str]:
    """found: arm -> (seeds, columns)."""
    yield f"\n| {what} | " + " | ".join(heads) + " |"
    yield "|---" * (len(heads) + 1) + "|"
    for arm, figures in found.items():
        cells = []
        for mean, half in (interval(column.tolist()) for column in figures.T):
            cells.append(f"{mean:{'+' if sign else ''}.4f}" + ("" if np.isnan(half) else f" ± {half:.4f}"))
        yield f"| {arm} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
