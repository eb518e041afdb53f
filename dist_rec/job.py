"""What every entry does around its work: arguments, errors a user can act on, the data's files, the run folder."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.distributed.elastic.multiprocessing.errors import record
from torchrec.distributed.model_parallel import DistributedModelParallel

from dist_rec.config import RunConfig, load, to_mapping
from dist_rec.contract import Fill
from dist_rec.data import synthetic
from dist_rec.data.batch import Batch
from dist_rec.data.catalogue import Catalogue
from dist_rec.data.footers import DataError, FileFooter, check_columns, fingerprint, read_footers
from dist_rec.data.item_table import ItemTable
from dist_rec.data.join import Join
from dist_rec.data.loader import Loader, Transform
from dist_rec.data.positives import Positives
from dist_rec.data.scan import scan_groups
from dist_rec.data.views import Views, with_empty_views
from dist_rec.embeddings.sharding import PlanError
from dist_rec.recommender import distribute
from dist_rec.serving.tensor_file import TensorFileError
from dist_rec.settings import Complaint, ConfigError
from dist_rec.training.checkpoint import Checkpoint, Checkpointer, CheckpointError
from dist_rec.training.compatible import check_same_model
from dist_rec.training.evaluation import Diagnostics
from dist_rec.training.retrieval import RetrievalTask
from dist_rec.training.runtime import Runtime, check_writable, rank_from_environment
from dist_rec.training.trainer import TrainingStopped

log = logging.getLogger(__name__)

USER_ERRORS = (ConfigError, DataError, PlanError, CheckpointError, TensorFileError, TrainingStopped)
"""Errors whose message is all a user needs; they end the process without a traceback."""


class _Stopped(Exception):
    """An error a user can act on, in one message, and whether this rank prints it."""

    def __init__(self, message: str, prints: bool, code: int = 1) -> None:
        super().__init__(message)
        self.prints, self.code = prints, code


def _briefly(main: Callable[[Sequence[str]], Any], interrupted: str, arguments: Sequence[str]) -> None:
    """Runs `main`; what a user can act on loses its traceback, in the launcher's summary too."""
    rank = rank_from_environment()
    try:
        main(arguments)
    except KeyboardInterrupt:
        raise _Stopped(interrupted, prints=not rank, code=130) from None
    except USER_ERRORS as error:
        # most of these are raised on every rank: rank 0 says them, the others leave in silence
        own = isinstance(error, DataError) and not isinstance(error, DataSetError)
        raise _Stopped(f"error: {error}", prints=own or not rank) from None
    except RuntimeError as error:
        if not any(text in str(error) for text in _LEFT_ALONE):
            raise
        raise _Stopped(f"rank {rank} ends because another rank did; see the error of that one", prints=True) from None


def run_entry(
    main: Callable[[Sequence[str]], Any],
    arguments: Sequence[str] | None,
    usage: str,
    interrupted: str = "interrupted",
) -> None:
    """Runs an entry on the command line's arguments; an error a user can act on is printed without a traceback.

    The error also reaches the launcher (through torchelastic's error file), which prints that of the first failing
    rank.

    Args:
        interrupted: what Ctrl-C leaves the user with.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage)
        raise SystemExit(0 if arguments else 2)
    quiet_libraries()
    try:
        record(partial(_briefly, main, interrupted))(arguments)
    except _Stopped as error:
        if error.prints and error.code == 1:
            raise SystemExit(str(error)) from None  # Python prints it and exits with 1
        if error.prints:
            print(error, file=sys.stderr)
        raise SystemExit(error.code) from None


def quiet_libraries() -> None:
    """Shows this package's messages, and of the libraries those a user of it can act on."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("dist_rec").setLevel(logging.INFO)
    for name in ("torchrec", "torch.fx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # advice to callers of APIs that TorchRec calls, not we
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", message=".*autograd kernel was not registered.*")


def load_config(arguments: Sequence[str]) -> RunConfig:
    """The config of `CONFIG [key=value ...]`."""
    return load(arguments[0], arguments[1:])


def check_output(path: str, suffix: str) -> Iterator[Complaint]:
    """Complaints about the option `output`, a file to be written, before anything is computed for it."""
    file = Path(path)
    if file.is_dir() or file.suffix != suffix:
        yield Complaint("output", f"is '{path}'; name a file that ends with {suffix}")
    else:
        yield from check_writable(file.parent, "output")


_LEFT_ALONE = ("Connection closed by peer", "Connection reset by peer")
"""How gloo says that the process at the other end is gone."""


class DataSetError(DataError):
    """What is wrong with the data on every rank alike: it is raised on all of them, and rank 0 says it."""


class JobData:
    """The files of every split, checked against the schema before a table is allocated, and loaders over them.

    Rank 0 reads the footers and everyone gets them, so that a cluster does not open every file once per rank. Making
    one is collective.

    Raises:
        DataSetError: on every rank, for a split that is missing, empty, damaged or does not fit the schema; and on the
            other ranks for whatever else went wrong on rank 0, which raises it as it is.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, splits: Sequence[str] = ("train", "validation", "test")):
        self._config, self._runtime = config, runtime
        answer = runtime.from_main(partial(self._read, splits), DataSetError)
        self._footers = {split: footers for split, footers in answer.items() if split in (*splits, ITEMS)}
        if not runtime.is_main:
            self._derive(answer, splits)

    def _read(self, splits: Sequence[str]) -> dict[str, list[FileFooter]]:
        """Rank 0's part."""
        try:
            found = _read_splits(self._config, splits, self._runtime.world_size)
            self._derive(found, splits)  # written to the cache here, so that the others only open it
        except DataError as error:
            raise DataSetError(str(error)) from error
        return found

    def _derive(self, footers: dict[str, list[FileFooter]], splits: Sequence[str]) -> None:
        """What is computed from the files once and kept in the cache: the item table, and what was positive before."""
        config = self._config
        cache = Path(config.data.cache)
        self.catalogue: Catalogue | None = None
        self._positives: dict[str, Positives] = {}
        if config.schema.items is not None:
            self.catalogue = Catalogue(config.schema, ItemTable(config.schema, footers[ITEMS], cache))
        evaluated = [split for split in splits if split in footers and (split != "train" or len(splits) == 1)]
        if config.evaluation == "retrieval" and evaluated:
            query, rows = config.metrics.retrieval.query, config.schema.of_rows()
            for split in dict.fromkeys(["train", *_until(evaluated)[:-1]]):
                if split in footers:
                    self._positives[split] = Positives(rows, query, footers[split], cache)

    def train(self, cursor: dict[str, Any] | None, first_step: int = 0) -> Loader:
        """The training batches, from a checkpoint's cursor on or from the start.

        first_step: how many steps lie behind.
        Raises DataSetError if the cursor is of other data or another seed.
        """
        try:
            return self._loader("train", cursor=cursor, one_pass=False, transform=self._filled_views(first_step))
        except DataError as error:
            raise DataSetError(str(error)) from error

    def task(self, split: str) -> RetrievalTask | None:
        """What is searched when a split is evaluated, for a model that is judged by retrieval; None for others."""
        if self._config.evaluation != "retrieval" or self.catalogue is None:
            return None
        earlier = [self._positives[name] for name in _until([split])[:-1] if name in self._positives]
        return RetrievalTask(
            self.catalogue,
            batch_size=self._config.data.eval_batch_size or self._config.data.batch_size,
            views=self._config.views,
            earlier=earlier,
            frequency=self._positives["train"].frequency,
        )

    def _filled_views(self, first_step: int) -> Transform | None:
        """What adds the auxiliaries' views to the training batches."""
        if not self._config.views:
            return None
        assert self.catalogue is not None
        parts = [part for part in self._config.attached.values() if hasattr(part, "views")]
        fills: list[Fill] = [part.fill(self.catalogue, self._config.run.seed) for part in parts]
        return partial(_fill_all, fills, first_step, self._runtime.rank)

    def split(self, name: str) -> Callable[[], Loader] | None:
        """A maker of loaders over "validation" or "test", one pass in file order; None if the config has none."""
        return partial(self._loader, name) if name in self._footers else None

    def items(self) -> dict[str, int | str] | None:
        """The fingerprint of the item table; None if there is none."""
        return self.fingerprint(ITEMS) if ITEMS in self._footers else None

    def once(self, name: str) -> Loader:
        """One pass over a split that the config has, in file order."""
        return self._loader(name)

    def scan(self, name: str, groups: Sequence[str]) -> Iterator[dict[str, NDArray[np.int64]]]:
        """This rank's share of a split's rows, some groups of the schema alone; see `data.scan`."""
        footers, runtime = self._footers[name], self._runtime
        return scan_groups(footers, self._config.schema, groups, runtime.rank, runtime.world_size)

    def fingerprint(self, name: str) -> dict[str, int | str]:
        """What tells a split's files from others; see `footers.fingerprint`."""
        return fingerprint(self._footers[name])

    def _loader(
        self,
        split: str,
        cursor: dict[str, Any] | None = None,
        one_pass: bool = True,
        transform: Transform | None = None,
    ) -> Loader:
        data, train = self._config.data, not one_pass
        if one_pass and self._config.views:
            transform = partial(_emptied, self._config.views)
        return Loader(
            data,
            self._config.schema.of_rows(),
            self._footers[split],
            rank=self._runtime.rank,
            world_size=self._runtime.world_size,
            batch_size=data.batch_size if train else data.eval_batch_size or data.batch_size,
            seed=self._config.run.seed,
            shuffle=data.shuffle and train,
            epochs=self._config.train.epochs if train else 1,
            cursor=cursor,
            pin_memory=self._runtime.device.type == "cuda",
            join=Join(self._config.schema, self.catalogue.table) if self.catalogue is not None else None,
            transform=transform,
        )


def _fill_all(fills: Sequence[Fill], first_step: int, rank: int, batch: Batch, number: int) -> Batch:
    for fill in fills:
        batch = fill(batch, first_step + number, rank)
    return batch


def _emptied(views: Views, batch: Batch, number: int) -> Batch:
    return with_empty_views(batch, views)


ITEMS = "items"
_ORDER = ("train", "validation", "test")


def _until(splits: Sequence[str]) -> tuple[str, ...]:
    """The splits up to the last one asked for: what was positive in those before it is known to its queries."""
    return _ORDER[: 1 + max(_ORDER.index(split) for split in splits)]


class Trained(NamedTuple):
    """A trained model with the weights of `checkpoint`, and the files of the split it is to be used on."""

    checkpoint: Checkpoint
    model: DistributedModelParallel
    data: JobData
    diagnostics: Diagnostics


def restore(config: RunConfig, runtime: Runtime) -> Trained:
    """The run in `run.dir` with its weights of `evaluate.step`, and the data of `evaluate.split`. Collective.

    Raises:
        ConfigError: the config has no such split. CheckpointError: there are no such weights, or they are of a model
            that predicts otherwise than the config's.
        DataSetError: see `JobData`.
    """
    split = config.evaluate.split
    if getattr(config.data, split) is None:
        others = [s for s in ("validation", "train") if getattr(config.data, s) is not None]
        text = f"is empty; set it, or choose evaluate.split={' or '.join(others)}"
        raise ConfigError([Complaint(f"data.{split}", text)])
    checkpointer = Checkpointer(Path(config.run.dir) / "checkpoints", config.checkpoint, runtime)
    checkpoint = checkpointer.trained(config.evaluate.step)
    check_same_model(checkpoint.meta["config"], to_mapping(config))
    data = JobData(config, runtime, splits=(split,))
    parts = distribute(config, runtime)
    checkpointer.load(checkpoint, parts.model, None)
    return Trained(checkpoint, parts.model, data, parts.diagnostics)


def _read_splits(config: RunConfig, splits: Sequence[str], world_size: int) -> dict[str, list[FileFooter]]:
    if config.data.synthetic is not None:
        try:
            synthetic.write(config.data.synthetic)
        except OSError as error:
            raise DataError(f"data.synthetic.path: '{config.data.synthetic.path}' cannot be written "
                            f"({error.strerror}); choose another folder") from error  # fmt: skip
    found: dict[str, list[FileFooter]] = {}
    owner: dict[str, str] = {}
    rows_schema, data = config.schema.of_rows(), config.data
    if config.schema.items is not None and data.items is not None:
        found[ITEMS] = read_footers(data.items)
        check_columns(found[ITEMS], config.schema.of_items())
    for split in _until(splits) if config.evaluation == "retrieval" else splits:
        path = getattr(config.data, split)
        if path is None:
            continue
        found[split] = read_footers(path)
        check_columns(found[split], rows_schema)
        for footer in found[split]:
            if owner.setdefault(os.path.realpath(footer.path), split) != split:
                first = owner[os.path.realpath(footer.path)]
                log.warning("data.%s and data.%s share %s: its metrics flatter the model", first, split, footer.path)
                break
        rows = sum(sum(f.row_group_rows) for f in found[split])
        if rows < world_size:
            raise DataError(f"data.{split} has {rows} rows for {world_size} ranks: every rank needs at least one row; "
                            f"use at most {rows} ranks or more data")  # fmt: skip
    return found
