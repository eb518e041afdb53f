"""Optimisers: fused into the backward for sharded tables, ordinary for everything else, one learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import Adam as FusedAdam
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from dist_rec.contract import AUXILIARIES
from dist_rec.settings import Complaint

TableOptimizerName = Literal["rowwise_adagrad", "adagrad", "sgd", "adam"]
CPU_TABLE_OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
"""FBGEMM has no CPU kernel for any other."""


@dataclass
class TableOptimizer:
    """The optimiser of the embedding tables, fused: rows are updated inside backward."""

    name: TableOptimizerName = "rowwise_adagrad"  # adam: CUDA only
    lr: float = 0.02
    eps: float = 1e-8


@dataclass
class DenseOptimizer:
    """The optimiser of everything that is not a table."""

    name: Literal["adagrad", "adamw", "sgd"] = "adagrad"
    lr: float = 0.01
    eps: float = 1e-8
    weight_decay: float = 0.0
    beta1: float = 0.9  # adamw
    beta2: float = 0.999  # adamw


@dataclass
class Schedule:
    """A factor on both learning rates: rises linearly over `warmup_steps`, stays 1, then decays to `floor`."""

    warmup_steps: int = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    decay_start: int = 0  # step at which the decay begins
    decay_steps: int = 0  # length of the decay in steps
    floor: float = 0.0  # the factor after the decay

    def factor(self, step: int) -> float:
        """The factor for the update of step `step`, counted from 0; a pure function, so resume needs no state."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.decay == "none" or step < self.decay_start:
            return warm
        done = min(1.0, (step - self.decay_start) / self.decay_steps)
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return warm * (self.floor + (1 - self.floor) * left)


@dataclass
class OptimConfig:
    """The `optim` section."""

    tables: TableOptimizer = field(default_factory=TableOptimizer)
    dense: DenseOptimizer = field(default_factory=DenseOptimizer)
    schedule: Schedule = field(default_factory=Schedule)
    # clip the norm of the gradients of all parameters that are not tables; tables are never clipped, but the second
    # layers of two-layer tables are. The parameters of auxiliaries are clipped apart, by a norm of their own: a head
    # that is never served must not slow down what is
    clip_norm: float | None = None

    def check(self, device_type: str) -> Iterator[Complaint]:
        """Complaints about values no optimiser accepts, and about what `device_type` has no kernel for."""
        if device_type == "cpu" and self.tables.name not in CPU_TABLE_OPTIMIZERS:
            names = ", ".join(CPU_TABLE_OPTIMIZERS)
            yield Complaint("tables.name", f"is {self.tables.name}, which FBGEMM has on CUDA only; on CPU use {names}")
        for key, value in (("tables.lr", self.tables.lr), ("dense.lr", self.dense.lr)):
            if not (math.isfinite(value) and value >= 0):
                yield Complaint(key, f"is {value}; a learning rate is a finite number >= 0")
        dense = self.dense
        for key, value in (
            ("tables.eps", self.tables.eps),
            ("dense.eps", dense.eps),
            ("dense.weight_decay", dense.weight_decay),
        ):
            if not (math.isfinite(value) and value >= 0):
                yield Complaint(key, f"is {value}; use a finite number >= 0")
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(dense, key) < 1:
                yield Complaint(f"dense.{key}", f"is {getattr(dense, key)}; AdamW's averages need 0 <= beta < 1")
        if not 0 <= self.schedule.floor <= 1:
            yield Complaint("schedule.floor", f"is {self.schedule.floor}; a decay ends at a factor between 0 and 1")
        if self.clip_norm is not None and not self.clip_norm > 0:
            yield Complaint("clip_norm", f"is {self.clip_norm}; use a norm > 0, or leave it out for no clipping")
        schedule = self.schedule
        for key in ("warmup_steps", "decay_start", "decay_steps"):
            if getattr(schedule, key) < 0:
                yield Complaint(f"schedule.{key}", f"is {getattr(schedule, key)}; steps are counted from 0")
        if schedule.decay != "none" and schedule.decay_steps == 0:
            yield Complaint("schedule.decay_steps", f"is 0; say over how many steps the {schedule.decay} decay goes")


class NonFiniteGradient(ArithmeticError):
    """The norm of the dense gradients is NaN or infinite."""


def fuse_table_optimizer(tables: Iterable[nn.Parameter], config: TableOptimizer) -> None:
    """Marks table parameters so that sharding fuses their optimiser into the backward; call before sharding."""
    optimizer, options = _table_optimizer(config)
    _apply_optimizer_in_backward(optimizer, tables, options)


def _table_optimizer(config: TableOptimizer) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    if config.name == "sgd":
        return torch.optim.SGD, {"lr": config.lr}
    kind = {"rowwise_adagrad": RowWiseAdagrad, "adagrad": torch.optim.Adagrad, "adam": FusedAdam}[config.name]
    return kind, {"lr": config.lr, "eps": config.eps}


class StepOptimizer:
    """Every optimiser of a run behind the two calls a train pipeline makes: `zero_grad` and `step`.

    Tables sharded over ranks are updated inside backward by their fused optimiser. Data-parallel tables have no fused
    optimiser (TorchRec leaves them frozen without a word), so they get the same rule as an ordinary one here.

    Raises:
        ValueError: a parameter belongs to no optimiser or to two.
    """

    def __init__(self, model: DistributedModelParallel, config: OptimConfig) -> None:
        self._config = config
        # a table of which this rank holds nothing is an empty parameter
        here = [(name, p) for name, p in model.named_parameters() if p.numel() > 0]
        unfused = dict(in_backward_optimizer_filter(iter(here)))
        replicated = {n: p for n, p in unfused.items() if ".embedding_bags." in n}
        self._dense = {n: p for n, p in unfused.items() if n not in replicated}
        parts: list[tuple[str, KeyedOptimizer]] = [("", model.fused_optimizer)]
        if replicated:
            parts.append(("", KeyedOptimizerWrapper(replicated, lambda ps: _unfused(ps, config.tables))))
        if self._dense:
            parts.append(("", KeyedOptimizerWrapper(self._dense, lambda ps: _dense(ps, config.dense))))
        self.combined = CombinedOptimizer(parts)
        self.combined.save_param_groups(False)
        _check_owners([name for name, _ in here], [p.params for _, p in parts])
        self._auxiliary = {n: p for n, p in self._dense.items() if n.startswith(AUXILIARIES)}
        self._served = {n: p for n, p in self._dense.items() if n not in self._auxiliary}
        self._table_groups = [g for _, p in parts[: 1 + bool(replicated)] for g in p.param_groups]
        self._dense_groups = [g for _, p in parts[1 + bool(replicated) :] for g in p.param_groups]
        self._counting = list(_kernels(model.fused_optimizer)) if config.tables.name == "adam" else []

    def set_step(self, step: int) -> None:
        """Sets the learning rates for step `step`; fused optimisers take theirs over at the next `zero_grad`."""
        factor = self._config.schedule.factor(step)
        for group in self._table_groups:
            group["lr"] = self._config.tables.lr * factor
        for group in self._dense_groups:
            group["lr"] = self._config.dense.lr * factor
        for kernel in self._counting:
            kernel.iter_cpu.fill_(step)  # FBGEMM counts look-ups as steps, those of an evaluation too

    def zero_grad(self) -> None:
        """Clears the gradients."""
        self.combined.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Clips and applies the dense gradients.

        Raises:
            NonFiniteGradient: on every rank at once, since DDP has averaged the gradients over all of them.
        """
        for parameters in (self._served, self._auxiliary):
            _clip(parameters, self._config.clip_norm)
        self.combined.step()

    def state(self) -> dict[str, dict[str, Any]]:
        """parameter name -> its optimiser state, live tensors; learning rates are not state, the config gives them."""
        return self.combined.state_dict()["state"]

    def finish_load(self, step: int) -> None:
        """Tells fused optimisers that count steps (Adam's bias correction) where the run stands."""
        for _, part in self.combined.optimizers:
            part.set_optimizer_step(step)
        self.zero_grad()

    def forget(self, names: Sequence[str]) -> None:
        """Brings the state of parameters back to where it begins, after `prepare_load` has taken a step with them."""
        for name in names:
            for value in self.state().get(name, {}).values():
                value.zero_()

    def prepare_load(self) -> None:
        """Makes every optimiser allocate its state, so that a checkpoint has somewhere to load into."""
        for _, part in self.combined.optimizers:
            if isinstance(part, KeyedOptimizerWrapper):
                part.init_state()


def _clip(parameters: Mapping[str, nn.Parameter], max_norm: float | None) -> None:
    """Scales the gradients of `parameters` down to `max_norm`; raises NonFiniteGradient, also without a maximum."""
    gradients = {n: p.grad for n, p in parameters.items() if p.grad is not None}
    if not gradients:
        return
    norm = nn.utils.get_total_norm(gradients.values())
    if not torch.isfinite(norm):
        names = [n for n, g in gradients.items() if not g.isfinite().all()]
        where = f"non-finite in {', '.join(names[:5])}" if names else "all values are finite, the norm overflows"
        raise NonFiniteGradient(f"gradient norm {norm.item()}; {where}")
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters.values(), max_norm, norm)


def _kernels(optimizer: Any) -> Iterator[Any]:
    """The FBGEMM modules behind the fused optimiser of a model."""
    if hasattr(optimizer, "optimizers"):
        for _, part in optimizer.optimizers:
            yield from _kernels(part)
    else:
        yield optimizer._emb_module


def _unfused(parameters: list[Tensor], config: TableOptimizer) -> torch.optim.Optimizer:
    if config.name == "adam":
        return torch.optim.Adam(parameters, lr=config.lr, eps=config.eps)
    kind, options = _table_optimizer(config)
    return kind(parameters, **options)


def _dense(parameters: list[Tensor], config: DenseOptimizer) -> torch.optim.Optimizer:
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, weight_decay=config.weight_decay)
    if config.name == "adagrad":
        return torch.optim.Adagrad(parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(parameters, lr=config.lr, eps=config.eps, weight_decay=config.weight_decay, betas=betas)


def _check_owners(names: Iterable[str], owners: list[Mapping[str, Any]]) -> None:
    counts = {name: sum(name in owned for owned in owners) for name in names}
    wrong = [f"{name} ({count} optimisers)" for name, count in counts.items() if count != 1]
    if wrong:
        raise ValueError(f"every parameter needs exactly one optimiser, but: {', '.join(wrong)}")
