"""Checkpoints through torch.distributed.checkpoint: complete or absent, found by reading, reshardable.

Layout of `<run.dir>/checkpoints/step-00000100/`::

    .metadata, *.distcp   model and optimiser state, written by torch.distributed.checkpoint
    rank-0.pt, ...        per rank: random-number state and the window of training metrics
    meta.json             step, data cursor, item table, config, sharding, versions, and the size of every other file

A checkpoint is written under a dot-name and renamed when it is whole; `meta.json` comes last. So a folder that has the
right name and whose files have the listed sizes is complete, and nothing else is believed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel

from dist_rec.contract import AUXILIARIES
from dist_rec.settings import Complaint
from dist_rec.training.optim import StepOptimizer
from dist_rec.training.runtime import Runtime

log = logging.getLogger(__name__)
FORMAT = 1
_UNSHARDED = {"data_parallel"}
_BY_COLUMN = {"column_wise", "table_column_wise", "grid_shard"}


@dataclass
class CheckpointConfig:
    """The `checkpoint` section."""

    # steps between checkpoints, each a loss of so much work at most when a job is killed. One is always written at the
    # end; null: only that one, and those of early stopping
    every: int | None = 1000
    keep: int = 2  # how many of the newest are kept; the best one of an early-stopping run is kept besides
    # auto: go on from the newest complete checkpoint in the run folder, if there is one. never: a run folder that has
    # checkpoints is refused, so that nothing is overwritten by accident.
    resume: Literal["auto", "never"] = "auto"
    # auxiliaries that may differ from those of the checkpoint that is continued. One that does, or that is new, starts
    # anew; one that the config has no more is dropped. Without its name here a difference stops the run
    renew: list[str] = field(default_factory=list)

    def check(self) -> Iterator[Complaint]:
        """Complaints about the section's own settings."""
        if self.every is not None and self.every < 1:
            yield Complaint("every", f"is {self.every}; use a number of steps >= 1, or null for none before the end")
        if self.keep < 1:
            yield Complaint("keep", f"is {self.keep}; at least the newest checkpoint must be kept")


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded here; the message says why and what to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Number of finished training steps."""
        return self.meta["step"]


def find(folder: Path) -> list[Checkpoint]:
    """The complete checkpoints in `folder`, oldest first. Incomplete ones are named in a warning and left alone.

    Raises:
        CheckpointError: there are checkpoints, but not one is complete: going on would silently start from nothing.
    """
    found, broken = [], []
    for path in sorted(folder.glob("step-*")):
        checkpoint = _read(path)
        if isinstance(checkpoint, Checkpoint):
            found.append(checkpoint)
        else:
            broken.append(f"{path} ({checkpoint})")
            log.warning("checkpoint %s is not complete and is passed over: %s", path, checkpoint)
    if broken and not found:
        raise CheckpointError(
            f"no checkpoint is complete: {'; '.join(broken)}. Remove them to start anew, or restore one"
        )
    return found


def trained(folder: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint that stands for the run: of step `step`, or else the best by early stopping, or the newest.

    Raises:
        CheckpointError: it does not exist or is not complete.
    """
    found = find(folder)
    if not found:
        raise CheckpointError(f"{folder} has no complete checkpoint; train first, or correct run.dir")
    wanted = step if step is not None else found[-1].meta["progress"]["best_step"]
    return found[-1] if wanted is None else at(folder, wanted)


def at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of step `step`; CheckpointError if it is not complete."""
    found = _read(folder / _name(step))
    if not isinstance(found, Checkpoint):
        raise CheckpointError(f"checkpoint {folder / _name(step)} cannot be used: {found}")
    return found


def _read(path: Path) -> Checkpoint | str:
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError) as error:
        return f"meta.json: {error}"
    if meta.get("format") != FORMAT:
        return f"format {meta.get('format')}, this version reads {FORMAT}"
    for name, size in meta["files"].items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, was written with {size}"
    return Checkpoint(path, meta)


class Checkpointer:
    """Saves, finds and loads the checkpoints of one run folder. Every method is collective."""

    def __init__(self, folder: Path, config: CheckpointConfig, runtime: Runtime) -> None:
        self.folder = folder
        self._config = config
        self._runtime = runtime

    def check_shared(self) -> None:
        """Raises CheckpointError if the ranks do not all see the same folder, before anything is trained."""
        runtime, probe = self._runtime, self.folder / f".probe-{os.getpid()}"
        if runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
        seen = runtime.total({"": int((self.folder / runtime.broadcast(probe.name)).exists())})[""]
        if runtime.is_main:
            probe.unlink()
        if seen < runtime.world_size:
            raise CheckpointError(_not_shared(self.folder, f"{runtime.world_size - seen} rank(s) do not see it"))

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, as rank 0 sees it; CheckpointError on every rank if all are damaged."""
        return self._runtime.from_main(lambda: next(reversed(find(self.folder)), None), CheckpointError)

    def at(self, step: int) -> Checkpoint:
        """The checkpoint of step `step`; raises CheckpointError if it is not complete."""
        return self._runtime.from_main(lambda: at(self.folder, step), CheckpointError)

    def trained(self, step: int | None = None) -> Checkpoint:
        """The checkpoint that stands for the run, see the function `trained`."""
        return self._runtime.from_main(lambda: trained(self.folder, step), CheckpointError)

    def save(
        self,
        step: int,
        model: DistributedModelParallel,
        optimizer: StepOptimizer,
        *,
        meta: Mapping[str, Any],
        own: Any,
        best_step: int | None = None,
    ) -> None:
        """Writes the checkpoint of step `step` and removes the ones that are no longer kept.

        Args:
            meta: JSON-able facts, the same on all ranks; `own`: this rank's tensors.
            best_step: a step whose checkpoint is kept whatever its age.
        """
        runtime, temporary = self._runtime, self.folder / f".{_name(step)}.tmp"
        if runtime.is_main:
            for left in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(left)
            temporary.mkdir(parents=True)
        dist.barrier(group=runtime.control)
        writer = dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True)
        # the group carries only what ranks tell each other, and tensors go to disk from each rank: no need of NCCL
        dcp.save(_state(model, optimizer), storage_writer=writer, process_group=runtime.control)
        with open(temporary / f"rank-{runtime.rank}.pt", "wb") as file:
            torch.save({"rng": _rng_state(runtime.device), "own": own}, file)
            file.flush()
            os.fsync(file.fileno())
        dist.barrier(group=runtime.control)
        problem = None
        if runtime.is_main:
            missing = [name for name in _expected(temporary, runtime.world_size) if not (temporary / name).is_file()]
            problem = _not_shared(self.folder, f"{', '.join(missing[:3])} did not arrive") if missing else None
        problem = runtime.broadcast(problem)
        if problem is not None:
            raise CheckpointError(problem)
        if runtime.is_main:
            self._commit(temporary, step, meta)
            self._retain(best_step)
        dist.barrier(group=runtime.control)

    def _commit(self, temporary: Path, step: int, meta: Mapping[str, Any]) -> None:
        files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
        whole = {"format": FORMAT, "step": step, "world_size": self._runtime.world_size, **meta, "files": files}
        with open(temporary / "meta.json", "w") as file:
            json.dump(whole, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        final, old = self.folder / _name(step), self.folder / f".{_name(step)}.old.tmp"
        if final.exists():  # an incomplete one of the same step, or one of an attempt that the run folder forgot
            final.rename(old)
        temporary.rename(final)
        _sync_folder(self.folder)
        if old.exists():
            shutil.rmtree(old)

    def _retain(self, best_step: int | None) -> None:
        paths = [c.path for c in find(self.folder)]
        best = self.folder / _name(best_step) if best_step is not None else None
        for path in paths[: -self._config.keep]:
            if path != best:
                shutil.rmtree(path)

    def load(
        self,
        checkpoint: Checkpoint,
        model: DistributedModelParallel,
        optimizer: StepOptimizer | None,
        fresh: Sequence[str] = (),
    ) -> list:
        """Loads weights and, if given, optimiser state; on another world size or plan the tables are resharded.

        Args:
            fresh: auxiliaries that stay as they were built, whatever the checkpoint has of them. Without an optimiser
                so does what the checkpoint lacks, or has in another shape, of any: an evaluation does not need it.

        Returns:
            Nothing without an optimiser, else what the ranks of the saving run passed as `own`, as far as it falls to
            this rank: rank r of W reads those of ranks r, r + W, ... On the same world size the random-number state is
            restored too.

        Raises:
            CheckpointError: the model differs, or a training that runs has removed the checkpoint meanwhile.
        """
        own = {n: v for n, v in model.state_dict().items() if n.startswith(AUXILIARIES)}
        names = [n for n in own if n.startswith(tuple(f"{AUXILIARIES}{name}." for name in fresh))]
        try:
            if optimizer is None:
                names += self._runtime.from_main(lambda: _lacking(checkpoint, own), OSError)
            built = {n: own[n].detach().clone() for n in names}
            if optimizer is not None:
                optimizer.prepare_load()
            state = _state(model, optimizer)
            wanted = {part: {n: v for n, v in of.items() if n not in built} for part, of in state.items()}
            dcp.load(wanted, checkpoint_id=checkpoint.path, process_group=self._runtime.control)
        except (CheckpointException, OSError) as error:
            raise _not_loaded(checkpoint, error) from error
        model.load_state_dict({**state["model"], **built})
        if optimizer is not None:
            optimizer.forget(list(built))
            optimizer.finish_load(checkpoint.step)
        return self._load_own(checkpoint) if optimizer is not None else []

    def _load_own(self, checkpoint: Checkpoint) -> list:
        runtime, saved = self._runtime, checkpoint.meta["world_size"]
        parts = []
        for rank in range(runtime.rank, saved, runtime.world_size):
            parts.append(torch.load(checkpoint.path / f"rank-{rank}.pt", weights_only=True))
        if saved == runtime.world_size:
            _set_rng_state(parts[0]["rng"], runtime.device)
        return [part["own"] for part in parts]


def _expected(folder: Path, world_size: int) -> list[str]:
    """The files that a checkpoint in `folder` has when every rank's have arrived."""
    parts = dcp.FileSystemReader(folder).read_metadata().storage_data.values()
    return sorted({part.relative_path for part in parts} | {f"rank-{rank}.pt" for rank in range(world_size)})


def _lacking(checkpoint: Checkpoint, own: Mapping[str, Any]) -> list[str]:
    """The tensors of a model that the checkpoint has not, or in another shape."""
    saved = dcp.FileSystemReader(checkpoint.path).read_metadata().state_dict_metadata
    return [n for n, v in own.items() if getattr(saved.get(f"model.{n}"), "size", None) != v.shape]


def _not_loaded(checkpoint: Checkpoint, error: BaseException) -> CheckpointError:
    """A training that runs removes old checkpoints, file by file, and does not know who reads them."""
    if not isinstance(_read(checkpoint.path), Checkpoint):
        cure = "raise checkpoint.keep of the training, or name a step that stays with evaluate.step"
        return CheckpointError(f"checkpoint {checkpoint.path} was removed while it was read; {cure}")
    reason = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
    return CheckpointError(f"checkpoint {checkpoint.path} does not fit this model: {reason}")


def _not_shared(folder: Path, fact: str) -> str:
    return f"{folder} is not the same folder for all ranks ({fact}); put run.dir on storage that all nodes share"


def check_reshardable(saved: Mapping[str, str], planned: Mapping[str, str], table_optimizer: str) -> None:
    """Optimiser state follows row-, table- and table-row-wise changes; it cannot follow the others.

    Args:
        saved, planned: table name -> sharding type.

    Raises:
        CheckpointError: a table moves to or from data-parallel or column-wise sharding.
    """
    if table_optimizer == "sgd":  # no state to move
        return

    def kind(sharding: str) -> str:
        return sharding if sharding in _UNSHARDED else "by_column" if sharding in _BY_COLUMN else "by_row"

    moved = [t for t in planned if t in saved and kind(planned[t]) != kind(saved[t])]
    if moved:
        changes = ", ".join(f"{t}: {saved[t]} -> {planned[t]}" for t in moved)
        example = f"embeddings.tables.{moved[0]}.sharding={saved[moved[0]]}"
        raise CheckpointError(
            f"the optimiser state of these tables cannot follow their change of sharding: {changes}. "
            f"Keep the sharding the checkpoint was written with, for example {example}"
        )


def _state(model: DistributedModelParallel, optimizer: StepOptimizer | None) -> dict[str, Any]:
    state: dict[str, Any] = {"model": model.state_dict()}
    if optimizer is not None:
        # an optimiser without state (plain SGD) has an empty entry, which DCP cannot read back
        full = {name: values for name, values in optimizer.state().items() if values}
        state |= {"optimizer": full} if full else {}
    return state


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
