"""Which settings may differ from a checkpoint's: those that do not change what its parameters mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dist_rec.training.checkpoint import CheckpointError

_OF_PREDICTIONS = (
    "schema.labels",
    "schema.sparse",
    "schema.dense",
    "schema.groups",
    "schema.items",
    "model",
    "embeddings.pooling",
    "embeddings.layout",
    "embeddings.inner_dim",
    "embeddings.factor_above",
    "embeddings.tables",
)
_OF_TRAINING = (
    "schema.weight",
    "embeddings.train_projection",
    "objective.name",
    "objective.cohorts",
    "optim.tables.name",
    "optim.dense.name",
)
# what a bad value does, the planner's estimates, and where a table lies may change; so may what metrics group by
_FREE = {"on_null", "out_of_range", "on_missing", "fill", "max_length", "mean_length"}
_FREE |= {"sharding", "kernel", "init_bound"}
_FREE |= {"path"}  # where something was read from; what was read is compared


def check_compatible(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Compares the config of a checkpoint with the one that would continue it, both as `config.to_mapping` gives them.

    Returns:
        The auxiliaries that differ and whose names `checkpoint.renew` has: they start anew, or are dropped.

    Raises:
        CheckpointError: naming every setting that would change the meaning of what the checkpoint holds.
    """
    auxiliaries = dict.fromkeys([*(saved.get("auxiliary") or {}), *(now.get("auxiliary") or {})])
    differing = {name: list(_changes(saved, now, f"auxiliary.{name}")) for name in auxiliaries}
    renewed = [name for name in now["checkpoint"]["renew"] if differing.get(name)]
    refused = {name: lines for name, lines in differing.items() if lines and name not in renewed}
    anew = f"; checkpoint.renew=[{','.join(refused)}] starts auxiliaries anew" if refused else ""
    changes = [change for key in (*_OF_PREDICTIONS, *_OF_TRAINING) for change in _changes(saved, now, key)]
    changes += [line for lines in refused.values() for line in lines]
    _refuse(changes, f"Put these back to continue, or train anew in another run.dir{anew}")
    return renewed


def check_same_model(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Compares the config of a checkpoint with the one by which it would be used, and not trained any further.

    Parameters say too little of that: a mean looks like a sum, and two columns of one width like each other.

    Raises:
        CheckpointError: naming every setting that would change the predictions.
    """
    changes = [change for key in _OF_PREDICTIONS for change in _changes(saved, now, key)]
    _refuse(changes, "Put these back, or correct run.dir; the config.yaml in a run's folder has all its settings")


def check_same_items(saved: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> None:
    """Compares the fingerprint of a checkpoint's item table with that of the run that would continue it.

    Either may be None: there was no table, or the checkpoint is of a version that did not look at it.

    Raises:
        CheckpointError: if the files differ. Items are drawn by their row in the table: the run would draw others.
    """
    changed = [f"{k} {saved.get(k)} -> {v}" for k, v in now.items() if saved.get(k) != v] if saved and now else []
    if changed:
        raise CheckpointError(
            f"data.items: the item table changed since the checkpoint ({'; '.join(changed)}), and items are drawn by "
            "their row in it; give the same files, or train anew in another run.dir"
        )


def _refuse(changes: list[str], fix: str) -> None:
    if changes:
        text = "the config differs from the checkpoint's in what its parameters mean:"
        raise CheckpointError("\n".join([text, *changes, f"  {fix}"]))


def _changes(saved: Mapping[str, Any], now: Mapping[str, Any], key: str) -> Iterator[str]:
    for path, old, new in _differences(_at(saved, key), _at(now, key), key):
        yield f"  {path}: {_short(old)} -> {_short(new)}"


def _at(values: Mapping[str, Any], key: str) -> Any:
    found: Any = values
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) or isinstance(new, Mapping):
        # an entry that is not there says as little as one in which nothing is set
        old, new = (value if isinstance(value, Mapping) else {} for value in (old, new))
    else:
        if old != new:
            yield path, old, new
        return
    if path == "schema.groups":  # a model may have parameters for each value of those with num_ids; the rest is free
        old, new = ({n: g for n, g in groups.items() if g.get("num_ids")} for groups in (old, new))
        old, new = {n: old[n] for n in old if n in new}, {n: new[n] for n in old if n in new}
    common = [name for name in old if name in new]
    if path.startswith("schema.") and common != [name for name in new if name in old]:
        yield f"{path} (order)", list(old), list(new)
    # a policy of this kind has a row of the table, or parameters of each domain, of its own
    before, after = ("reserved" in (of.get("out_of_range"), of.get("on_null")) for of in (old, new))
    if before != after:
        yield f"{path} (out_of_range or on_null: reserved)", before, after
    for name in dict.fromkeys([*old, *new]):
        if name not in _FREE:
            yield from _differences(old.get(name), new.get(name), f"{path}.{name}")


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 120 else text[:117] + "..."
