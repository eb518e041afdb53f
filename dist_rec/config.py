"""`RunConfig`: the sum of every component's own settings, read from YAML and `key=value` overrides.

Each component checks its own part; this file gathers the complaints and reports them together.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_rec.contract import EvaluationKind
from dist_rec.data.loader import DataConfig
from dist_rec.data.schema import Schema
from dist_rec.embeddings.sharding import ShardingConfig, check_columns, check_kernels, check_splittable
from dist_rec.embeddings.tables import EmbeddingsConfig, make_tables
from dist_rec.metrics.compute import MetricsConfig
from dist_rec.metrics.compute import names as metric_names
from dist_rec.serving.collapse import ExportConfig
from dist_rec.settings import COMPONENT, Choice, Complaint, ConfigError, gather, parse
from dist_rec.training.checkpoint import CheckpointConfig
from dist_rec.training.evaluation import EvaluateConfig
from dist_rec.training.optim import OptimConfig
from dist_rec.training.report import ReportConfig
from dist_rec.training.runtime import RunSettings
from dist_rec.training.trainer import TrainConfig

NO_DEVICE = "none"
"""The device type of what only reads a config, and neither trains nor looks anything up by it: an export."""


def choice(room: str) -> Choice:
    """The components of a folder ("models", "objectives", "auxiliary"): one per file, called by the file's name."""
    package = importlib.import_module(f"dist_rec.{room}")

    def names() -> list[str]:
        return sorted(m.name for m in pkgutil.iter_modules(package.__path__))

    def load(name: str) -> type:
        return importlib.import_module(f"{package.__name__}.{name}").Config

    return Choice(names, load)


def _component(room: str, **default: Any) -> Any:
    return field(metadata={COMPONENT: choice(room)}, **default)


@dataclass
class RunConfig:
    """One run. Every section is documented where it is declared."""

    schema: Schema
    data: DataConfig
    model: Any = _component("models")
    objective: Any = _component("objectives", default_factory=lambda: choice("objectives").load("bce")())
    auxiliary: dict[str, Any] = _component("auxiliary", default_factory=dict)
    run: RunSettings = field(default_factory=RunSettings)
    embeddings: EmbeddingsConfig = field(default_factory=EmbeddingsConfig)
    sharding: ShardingConfig = field(default_factory=ShardingConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def check(self, device_type: str | None = None) -> Iterator[Complaint]:
        """Every component's complaints, and those about what does not go together; None sections are skipped.

        device_type: what will train, if it is not this machine (a plan for a cluster, made on a laptop); or NO_DEVICE.
        """
        if self.run and device_type is None:
            yield from gather("run", self.run.check())
        device = device_type or (self.run.device_type if self.run else "cpu")
        for key in ("schema", "data", "sharding", "checkpoint", "report", "export"):
            if getattr(self, key) is not None:
                yield from gather(key, getattr(self, key).check())
        if self.optim:
            yield from gather("optim", self.optim.check(device))
        if self.train and self.data:
            known = metric_names(self.schema, self.metrics, self.evaluation) if self.schema and self.metrics else None
            yield from gather("train", self.train.check(self.data.validation is not None, known))
        if self.schema and self.data:
            yield from self._check_items(self.schema, self.data)
        if self.schema and not list(self.schema.check()):
            yield from self._check_with_schema(self.schema, device)

    @property
    def evaluation(self) -> EvaluationKind:
        """How the model's predictions are judged."""
        return getattr(self.model, "evaluation", "labels")

    @property
    def attached(self) -> dict[str, Any]:
        """The auxiliaries that a run has: all but those of weight 0 that say so, which would be looked up for nothing.

        An optimiser with momentum moves every row that is looked up, at a gradient of 0 too.
        """
        return {name: part for name, part in self.auxiliary.items() if not getattr(part, "is_off", False)}

    @property
    def views(self) -> dict[str, Sequence[str]]:
        """The views of all auxiliaries that are attached, in their order."""
        found: dict[str, Sequence[str]] = {}
        for part in self.attached.values():
            found |= part.views(self.schema) if hasattr(part, "views") else {}
        return found

    def _check_items(self, schema: Schema, data: DataConfig) -> Iterator[Complaint]:
        if schema.items is not None and data.items is None:
            yield Complaint("data.items", "is missing; schema.items declares an item table: say where it lies")
        if schema.items is None and data.items is not None:
            yield Complaint("schema.items", "is missing; data.items names an item table: say which feature has its ids")
        for name, part in (self.auxiliary or {}).items():
            if hasattr(part, "views") and not getattr(self.model, "serves_views", False):
                text = f"looks at views of items, which model '{_name_of(self.model)}' does not encode"
                yield Complaint(f"auxiliary.{name}", f"{text}; leave it out, or use a model with two towers")
            if schema.items is not None and hasattr(part, "maskable") and hasattr(self.model, "reads"):
                # a view that masks all that is read shows nothing, and the number of features would be misjudged
                unread = [f for f in part.maskable(schema) if f not in self.model.reads(schema)]
                if unread:
                    text = f"would mask {', '.join(unread)}, which the model does not read; name those that it reads"
                    yield Complaint(f"auxiliary.{name}.features", text)

    def _check_with_schema(self, schema: Schema, device: str) -> Iterator[Complaint]:
        if self.metrics:
            yield from gather("metrics", self.metrics.check(schema))
        parts = {"model": self.model, "objective": self.objective}
        parts |= {f"auxiliary.{name}": part for name, part in (self.auxiliary or {}).items()}
        wrong = {key: list(gather(key, part.check(schema))) for key, part in parts.items() if part is not None}
        for complaints in wrong.values():
            yield from complaints
        # an arch with a complaint may not be able to say which tables it wants
        if self.model and not wrong["model"] and self.embeddings:
            sets = self.model.table_sets(schema)
            yield from gather("embeddings", self.embeddings.check(sets, schema))
            tables = make_tables(sets, schema, self.embeddings)
            if self.sharding:
                yield from gather("sharding", check_columns(tables, self.sharding))
            if self.optim:
                yield from gather("embeddings", check_splittable(tables, self.optim.tables.name))
            if device != NO_DEVICE:
                yield from gather("embeddings", check_kernels(tables, device))


def load(path: str, overrides: Sequence[str] = (), device_type: str | None = None) -> RunConfig:
    """The config in file `path` with `key=value` overrides, checked for this machine or for `device_type`, see `check`.

    Raises:
        ConfigError: with every complaint, each with its full key and the fix.
    """
    return from_mapping(read(path, overrides), device_type)


def from_mapping(values: dict[str, Any], device_type: str | None = None) -> RunConfig:
    """A checked `RunConfig` from a nested mapping; raises like `load`."""
    complaints: list[Complaint] = []
    config = parse(RunConfig, values, complaints)
    complaints += config.check(device_type)
    if complaints:
        raise ConfigError(complaints)
    return config


def read(path: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The merged mapping, not yet typed: the file, on top of the files its `base` key lists, under the overrides."""
    try:
        merged = _merged(" ".join(overrides), _read_file(Path(path), ()), _read_overrides(overrides))
        values = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError([Complaint(getattr(error, "full_key", None) or path, str(error).splitlines()[0])]) from error
    assert isinstance(values, dict)
    return values  # type: ignore[return-value]


def overrides_mapping(overrides: Sequence[str]) -> dict[str, Any]:
    """Nested mapping of `key=value` texts, not yet typed."""
    values = OmegaConf.to_container(_read_overrides(overrides), resolve=True)
    assert isinstance(values, dict)
    return values  # type: ignore[return-value]


def _folder(path: Path, seen: tuple[Path, ...]) -> Complaint:
    place = os.path.normpath(path) + (f", on which {seen[-1]} builds" if seen else "")
    inside = sorted(file.name for file in path.glob("*.yaml"))
    fix = f"in it: {', '.join(inside)}" if inside else "it has none in it"
    if "config.yaml" in inside:  # the folder of a run, of an export
        fix = f"did you mean {path / 'config.yaml'}?"
    return Complaint(place, f"is a folder, and a config is a file; {fix}")


def _read_file(path: Path, seen: tuple[Path, ...]) -> DictConfig:
    if path.resolve() in seen:
        raise ConfigError([Complaint("base", f"of {path} leads back to itself; remove the circle")])
    if path.is_dir():
        raise ConfigError([_folder(path, seen)])
    if not path.is_file() and seen:
        text = (
            f"does not exist, and {seen[-1]} builds on it; make it first (that file's header says how), or correct base"
        )
        raise ConfigError([Complaint(os.path.normpath(path), text)])
    if not path.is_file():
        known = sorted(str(p) for p in Path("configs").rglob("*.yaml"))
        raise ConfigError(
            [Complaint(str(path), "does not exist" + (f"; configs: {', '.join(known)}" if known else ""))]
        )
    try:
        config = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError([Complaint(str(path), f"is not valid YAML: {' '.join(str(error).split())}")]) from error
    if not isinstance(config, DictConfig):
        raise ConfigError([Complaint(str(path), "is not a mapping; a config has sections such as schema, data, model")])
    bases = config.pop("base", [])
    bases = [bases] if isinstance(bases, str) else list(bases or [])
    layers = [_read_file(path.parent / base, (*seen, path.resolve())) for base in bases]
    return _merged(str(path), *layers, config)


def _read_overrides(overrides: Sequence[str]) -> DictConfig:
    bad = [o for o in overrides if "=" not in o or o.startswith("-")]
    if bad:
        raise ConfigError(
            [Complaint(o, "is not an override; write key=value, for example train.steps=100") for o in bad]
        )
    merged = DictConfig({})
    for override in overrides:
        try:
            parsed = OmegaConf.from_dotlist([override])
        except yaml.YAMLError:  # a glob such as *.parquet is no YAML, but it is a good path
            key, _, text = override.partition("=")
            parsed = DictConfig({})
            OmegaConf.update(parsed, key, text, force_add=True)
        merged = _merged(override, merged, parsed)
    return merged


def _merged(what: str, *layers: DictConfig) -> DictConfig:
    try:
        merged = OmegaConf.merge(*layers)
    except (TypeError, ValueError) as error:  # a list where a mapping is, or the reverse
        reason = str(error).splitlines()[0]
        raise ConfigError([Complaint(what, f"does not fit what it overrides ({reason}); keep its shape")]) from error
    assert isinstance(merged, DictConfig)
    return merged


def split_options(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(values of the keys without a dot, which are a verb's own options; the others, which override a config)."""
    own = [a for a in arguments if "." not in a.partition("=")[0] or a.startswith("-")]
    values = OmegaConf.to_container(_read_overrides(own))
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, [a for a in arguments if a not in own]


def to_mapping(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain values, accepted again by `from_mapping`."""
    values = asdict(config)
    for key in ("model", "objective"):
        values[key] = {"name": _name_of(getattr(config, key)), **values[key]}
    return values


def to_yaml(config: RunConfig) -> str:
    """The resolved config, loadable again by `load`."""
    return yaml.safe_dump(to_mapping(config), sort_keys=False)


def _name_of(component: Any) -> str:
    return type(component).__module__.rsplit(".", 1)[1]
