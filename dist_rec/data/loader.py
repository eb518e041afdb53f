"""`Loader`: Parquet files -> a stream of batches for one rank, with equal numbers of equal batches on every rank.

One thread assembles batches, `decode_threads` more decode row groups ahead of it (pyarrow releases the GIL). No worker
processes: measured, they cost four to five times more per row.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_rec.data.batch import Batch
from dist_rec.data.blocks import BatchBuilder
from dist_rec.data.footers import FileFooter, fingerprint, is_list, open_file, secret_problem
from dist_rec.data.ids import PolicyCounts
from dist_rec.data.join import Join
from dist_rec.data.parquet import DECODED_VALUES, Columns, Place, convert, decode, id_dtype, is_fixed
from dist_rec.data.read_ahead import Channel, Closed, DaemonPool, RowGroupCache, yield_to_training
from dist_rec.data.row_groups import Block, Course, EpochOrder, positions
from dist_rec.data.schema import Schema
from dist_rec.data.synthetic import SyntheticConfig
from dist_rec.settings import Complaint, gather

Transform = Callable[[Batch, int], Batch]
"""(batch, its number since the loader's start) -> batch, pure; runs on the reader's thread."""

_JOIN_SECONDS = 5.0  # for threads in the middle of a decode; they are daemons, so a slower one is left behind
_PLACES_SHOWN = 3
_KEPT = 1.15  # what allocators keep of freed memory: the process grows by more than what is alive


@dataclass
class DataConfig:
    """Where the data are and how they are read.

    Paths: a file, folder or glob, local or a URI (s3://bucket/train) without a secret in it.
    """

    train: str
    batch_size: int  # rows per rank and step
    validation: str | None = None
    test: str | None = None
    items: str | None = None  # the item table, with one row per item; `schema.items` says what it holds
    cache: str = ".data/cache"  # item tables and lists of positives in the form in which ranks map them into memory
    eval_batch_size: int | None = None  # default: batch_size
    shuffle: bool = True
    shuffle_rows: int = 131072  # rows of a rank's shuffle buffer; memory: `megabytes`
    decode_threads: int = 1  # row groups decoded at the same time
    synthetic: SyntheticConfig | None = None  # written first if `train` does not exist

    def check(self) -> Iterator[Complaint]:
        """Complaints about the settings themselves; files are checked when a Loader is made."""
        for name in ("batch_size", "eval_batch_size", "shuffle_rows", "decode_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield Complaint(name, f"is {value}; use at least 1")
        for name in ("train", "validation", "test", "items"):
            if problem := secret_problem(getattr(self, name) or ""):
                yield Complaint(name, problem)
        if self.synthetic is not None:
            yield from gather("synthetic", self.synthetic.check())


class Loader:
    """Batches of one rank. Iterating begins at this loader's start each time and reads with threads of its own.

    Every rank gets the same number of batches of `batch_size` rows for any number of ranks, row groups and rows; short
    tails are padded with rows of weight 0. Every row is dealt exactly once per epoch, also across a resume with another
    number of ranks, another batch size or other shuffle settings.

    Args:
        config: the shuffle buffer and the threads. schema: what the files hold, see `footers.check_columns`.
        footers: `footers.read_footers` of the data set, already checked against the schema.
        rank, world_size, batch_size: B rows for each of W ranks.
        seed: draws the order; unused without shuffle. shuffle: usually `config.shuffle`, False in evaluation.
        epochs: stop before the epoch of this number; None: never stop.
        cursor: from an earlier `cursor`, of any rank.
        pin_memory: batches in page-locked memory.
        join: adds the columns of the item table; `schema` and `footers` are of the rows' own files.
        transform: applied to every batch after that, on the reader's thread too.

    Raises DataError if the cursor is of other data or another seed.

    Attributes:
        wait_seconds: how long the consumer has been blocked in the current pass.
        counts: what the schema's policies did to the rows read so far in the current pass, see `ids.PolicyCounts`.
    """

    def __init__(
        self,
        config: DataConfig,
        schema: Schema,
        footers: Sequence[FileFooter],
        *,
        rank: int,
        world_size: int,
        batch_size: int,
        seed: int,
        shuffle: bool,
        epochs: int | None,
        cursor: dict[str, Any] | None = None,
        pin_memory: bool = False,
        join: Join | None = None,
        transform: Transform | None = None,
    ) -> None:
        self._schema = schema
        self._rank = rank
        self._config = config
        self._shuffled = shuffle
        self._pin = pin_memory
        self._join, self._transform = join, transform
        self._groups = [
            _RowGroup(footer.path, i, first, rows)
            for footer in footers
            for i, (first, rows) in enumerate(_with_starts(footer.row_group_rows))
        ]
        self._course = Course(
            [group.rows for group in self._groups],
            functools.cache(lambda: fingerprint(footers)),
            world_size=world_size,
            batch_size=batch_size,
            shuffle_rows=config.shuffle_rows if shuffle else 0,
            seed=seed,
            epochs=epochs,
            cursor=cursor,
        )
        self._arrow_schema = footers[0].arrow_schema
        self.wait_seconds = 0.0
        self.counts = PolicyCounts()
        self._reader: _Reader | None = None

    @property
    def batches_left(self) -> int | None:
        """Batches from this loader's start to its end, the same on every rank; None if it is endless."""
        return self._course.batches_left

    def examples(self, batches_finished: int) -> int:
        """Rows dealt to all ranks together since the first epoch began, when that many batches are finished."""
        return self._course.rows_before(batches_finished)

    def describe(self) -> str:
        """In words, what is read and how much memory the rows in flight take."""
        total, config = sum(group.rows for group in self._groups), self._config
        buffer = f"shuffle buffer {config.shuffle_rows:,} rows" if self._shuffled else "no shuffle"
        phase = self._course.at(0)[0]
        in_memory = sorted(group.rows for group in self._groups)[-1 - config.decode_threads :]
        block_rows = min(phase.block_rows, phase.num_batches * phase.batch_size)
        is_remote = any(_is_remote(group.path) for group in self._groups)
        memory = megabytes(self._schema, self._arrow_schema, block_rows, sum(in_memory), is_remote)
        return f"data: {total:,} rows in {len(self._groups):,} row groups; {buffer}, about {memory:,.0f} MB per rank"

    def cursor(self, batches_finished: int) -> dict[str, Any]:
        """JSON-able, the same on every rank: where to go on after that many batches since this loader's start."""
        return self._course.cursor(batches_finished)

    def where(self, batch: int) -> str:
        """In words, where the rows of this rank's batch-th batch since the loader's start lie."""
        phase, i = self._course.at(batch)
        pieces = phase.ordered(self._rank, i * phase.batch_size, (i + 1) * phase.batch_size)
        places = []
        for group, rows in self._course.order(phase).split(np.sort(positions(pieces))):
            at = self._groups[group]
            places.append(f"{at.path} row group {at.index}, rows {at.first_row + rows[0]}..{at.first_row + rows[-1]}")
        more = f" and {len(places) - _PLACES_SHOWN} more row groups" if len(places) > _PLACES_SHOWN else ""
        what = "; ".join(places[:_PLACES_SHOWN]) or "only padding"
        return f"epoch {phase.epoch}, batch {i} of {phase.num_batches}, rank {self._rank}: {what}{more}"

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self.wait_seconds, self.counts = 0.0, PolicyCounts()
        changes = self._join is not None or self._transform is not None
        builder = BatchBuilder(self._schema, self._course.at(0)[0].batch_size, self._pin and not changes)
        reader = self._reader = _Reader(
            self._course, self._groups, self._schema, self._rank, self._config, builder,
            partial(self._finished, pin=self._pin and changes),
        )  # fmt: skip
        return self._consume(reader)

    def _consume(self, reader: _Reader) -> Iterator[Batch]:
        try:
            while True:
                item, seconds = reader.channel.get()
                self.wait_seconds += seconds
                if item is None:
                    return
                batch, counts = item
                self.counts.update(counts)
                yield batch
        except Closed:
            return
        finally:
            reader.close()

    def _finished(self, batch: Batch, number: int, counts: PolicyCounts, pin: bool) -> Batch:
        """What becomes of a batch of rows before it is dealt; runs on the reader's thread."""
        batch = batch if self._join is None else self._join(batch, counts)
        batch = batch if self._transform is None else self._transform(batch, number)
        return batch.pin_memory() if pin else batch

    def close(self) -> None:
        """Stops the threads of the current pass; its iterator then ends. Safe at any time, also twice."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def megabytes(schema: Schema, arrow: pa.Schema, block_rows: int, decoded_rows: int, is_remote: bool) -> float:
    """Estimated megabytes that a loader takes; measured, within a quarter.

    arrow: types in the files. block_rows: of a block; there is the one being dealt, the next one as batches, and its
    columns in file order. decoded_rows: of all row groups in memory at a time. is_remote: see `decode`'s at_once.
    """
    ids = sum(column.mean_length for column in schema.sparse.values())
    numbers = 4 * (len(schema.dense) + len(schema.labels) + 1) + 8 * len(schema.groups)
    row = numbers + ids * (id_dtype(schema).itemsize + (4 if schema.is_weighted else 0))
    in_block = 3 * row + 4 * len(schema.dense)  # dense columns are turned into rows on the way
    if not all(is_fixed(column) for column in schema.sparse.values()):
        in_block += row - numbers + 24 * len(schema.sparse)  # bags in the order dealt, lengths and ends
    decoded = sum(_width(arrow.field(name).type, _mean_length(schema, name)) for name in schema.columns())
    decoded *= decoded_rows
    pages = decoded if is_remote else min(decoded, 16 * DECODED_VALUES)
    return _KEPT * (block_rows * in_block + decoded + pages) / 1e6


def _width(kind: pa.DataType, mean_length: float) -> float:
    """Bytes that a decoded value takes; lists are of that mean length."""
    return 4 + mean_length * _width(kind.value_type, 0) if is_list(kind) else kind.bit_width / 8


def _mean_length(schema: Schema, name: str) -> float:
    """Of the lists in a Parquet column of ids or of their weights."""
    return max([c.mean_length for key, c in schema.sparse.items() if name in (key, c.weights)], default=0.0)


def _is_remote(path: str) -> bool:
    return "://" in path


@dataclass(frozen=True)
class _RowGroup:
    path: str
    index: int
    first_row: int  # of the file
    rows: int


def _with_starts(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    start = 0
    for size in sizes:
        yield start, size
        start += size


class _Reader:
    """The threads of one pass. Puts (batch, policy counts since the batch before) in `channel`."""

    def __init__(
        self,
        course: Course,
        groups: list[_RowGroup],
        schema: Schema,
        rank: int,
        config: DataConfig,
        builder: BatchBuilder,
        finished: Callable[[Batch, int, PolicyCounts], Batch],
    ) -> None:
        # a block's batches: the next block is assembled while the trainer goes through the one that waits here
        phase = course.at(0)[0]
        self.channel: Channel[tuple[Batch, PolicyCounts]] = Channel(phase.block_rows // phase.batch_size)
        self._course, self._groups, self._schema, self._rank = course, groups, schema, rank
        self._builder, self._finished = builder, finished
        self._ahead = config.decode_threads
        self._files = threading.local()
        self._columns: Columns | None = None
        self._pool = DaemonPool(config.decode_threads, "decode")
        self._thread = threading.Thread(target=self._run, name="assemble", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.channel.close()
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        number, counts = 0, PolicyCounts()
        try:
            yield_to_training()
            for block in self._blocks(counts):
                for batch in block:
                    ready = self._finished(batch, number, counts)
                    number += 1
                    self.channel.put((ready, counts.copy()))
                    counts.clear()
                self.channel.flush()
            self.channel.end()
        except Closed:
            pass  # the consumer stopped early and wants nothing more
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
            self._fail(error)
        finally:
            self._pool.close()

    def _fail(self, error: BaseException) -> None:
        with contextlib.suppress(Closed):  # nobody is left to be told
            self.channel.end(error)

    def _blocks(self, counts: PolicyCounts) -> Iterator[Iterator[Batch]]:
        for phase, first in self._course.phases():
            order = self._course.order(phase)
            cache = RowGroupCache(order.touched(phase.rank_slice(self._rank)), self._decode, self._pool, self._ahead)
            try:
                for block in phase.blocks(self._rank, first):
                    columns = self._read(block, order, cache, counts)
                    yield self._builder.batches(columns, len(block.rows), block.order, block.num_batches)
            finally:
                cache.close()

    def _read(self, block: Block, order: EpochOrder, cache: RowGroupCache[pa.Table], counts: PolicyCounts) -> Columns:
        """A block's rows in file order. The arrays are used again for the next block: fresh ones cost page faults."""
        columns, at = self._columns, 0
        if columns is None or columns.weights.size < len(block.rows):
            columns = self._columns = Columns.empty(self._schema, len(block.rows))
        for parts in columns.ragged.values():
            parts.clear()
        for group, rows in order.split(block.rows):
            self.channel.check()
            table, here = cache.get(group), self._groups[group]
            span = slice(int(rows[0]), int(rows[-1]) + 1)
            is_run = span.stop - span.start == len(rows)
            table = table.slice(span.start, len(rows)) if is_run else table.take(rows)
            place = Place(here.path, here.index, here.first_row, span if is_run else rows)
            convert(table, self._schema, columns, at, counts, place)
            at += len(rows)
        return columns

    def _decode(self, group: int) -> pa.Table:
        here = self._groups[group]
        file = self._open(here.path)
        return decode(file, here.path, here.index, here.rows, self._schema, at_once=_is_remote(here.path))

    def _open(self, path: str) -> pq.ParquetFile:
        # one open file per thread: readers of one file are not safe to share, and row groups come file by file
        if getattr(self._files, "path", None) != path:
            self._files.file, self._files.path = open_file(path), path
        return self._files.file
