"""The `dist-rec` command: one thin verb per entry module."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

VERBS = {
    "init": ("dist_rec.init", "write a commented starting config for a Parquet data set"),
    "prepare": ("dist_rec.prepare", "turn the raw files of a public data set into Parquet with a schema"),
    "train": ("dist_rec.train", "train a model by a config"),
    "evaluate": ("dist_rec.evaluate", "evaluate a trained run"),
    "export": ("dist_rec.export", "write what is served of a trained run: one layer per table, no process group"),
    "predict": ("dist_rec.predict", "score a Parquet data set with an export"),
    "cohorts": ("dist_rec.cohorts", "find the two cohorts whose predictions differ most"),
    "report": ("dist_rec.report", "compare trained runs on one HTML page"),
    "correlation": ("dist_rec.correlation", "measure how much the columns of an item table say about each other"),
    "plan": ("dist_rec.plan", "show which rank would hold which table, offline"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `dist-rec VERB ...`; the verb's module is imported only then, as torchrec takes seconds."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {verb:<13}{text}" for verb, (_, text) in VERBS.items()]
        print("\n".join(["usage: dist-rec VERB ...", "", *lines, "", "dist-rec VERB --help says more."]))
        raise SystemExit(0 if arguments else 2)
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"verbs: {', '.join(VERBS)}"
        raise SystemExit(f"dist-rec: '{verb}' is not a verb; {hint}")
    importlib.import_module(VERBS[verb][0]).main(rest)
