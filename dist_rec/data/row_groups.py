"""Who reads which rows in what order, and where to go on after a stop: integer arithmetic, no files and no tensors.

The words, from large to small:

epoch      every row once. Its order of row groups is a function of (seed, epoch); *positions* 0..N-1 number the rows
           of the row groups laid end to end in that order.
sequence   a list of pieces that says which positions come in which order: `Span`s and `Shuffled`s.
phase      a stretch of an epoch dealt under fixed settings. It begins with the sequence that is still unread. Rank r
           of W owns the r-th of W contiguous slices, equal up to one row; every rank has the same number of batches
           of B rows, the short tails padded.
block      S consecutive rows of a rank's slice (S a multiple of B), shuffled within.

All ranks finish the same number of batches, so what is unread is a function of the phase and that one number. A run
that goes on with other settings (another number of ranks) begins a new phase of the same epoch: exactly the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from dist_rec.data.footers import DataError

_CURSOR_VERSION = 1
_PLAIN_BLOCK_ROWS = 65536  # rows assembled at once without shuffle; affects speed and memory only, never the order


class Span(NamedTuple):
    """The positions start, start + 1, .., stop - 1."""

    start: int
    stop: int


@dataclass(frozen=True)
class Shuffled:
    """Places start .. stop-1 of the permutation, drawn from `key`, of all positions of `pieces`."""

    pieces: tuple[Piece, ...]
    key: tuple[int, ...]
    start: int
    stop: int


Piece = Span | Shuffled


def length(pieces: Sequence[Piece]) -> int:
    """Rows in a sequence."""
    return sum(piece.stop - piece.start for piece in pieces)


def cut(pieces: Sequence[Piece], start: int, stop: int) -> tuple[Piece, ...]:
    """Rows start .. stop-1 of a sequence."""
    result: list[Piece] = []
    for piece in pieces:
        rows = piece.stop - piece.start
        low, high = max(start, 0), min(stop, rows)
        if low < high and isinstance(piece, Span):
            result.append(Span(piece.start + low, piece.start + high))
        elif low < high and isinstance(piece, Shuffled):
            result.append(replace(piece, start=piece.start + low, stop=piece.start + high))
        start, stop = start - rows, stop - rows
        if stop <= 0:
            break
    return tuple(result)


def permutation(key: Sequence[int], count: int) -> np.ndarray:
    """(count,) int64: the permutation of 0..count-1 that belongs to `key`."""
    return np.random.default_rng(list(key)).permutation(count)


def positions(pieces: Sequence[Piece]) -> np.ndarray:
    """(length,) int64: the positions of a sequence, in its order."""
    parts = []
    for piece in pieces:
        if isinstance(piece, Span):
            parts.append(np.arange(piece.start, piece.stop))
        else:
            order = permutation(piece.key, length(piece.pieces))
            parts.append(positions(piece.pieces)[order[piece.start : piece.stop]])
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


class EpochOrder:
    """The row groups of one epoch laid end to end.

    Attributes:
        groups: (G,) index of the data set's row group at each place.
        edges: (G + 1,) position at which each place begins, and N.
    """

    def __init__(self, sizes: np.ndarray, seed: int, epoch: int, permuted: bool) -> None:
        self.groups = permutation((seed, epoch), len(sizes)) if permuted else np.arange(len(sizes))
        self.edges = np.concatenate([[0], np.cumsum(sizes[self.groups])])

    def split(self, ascending: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Ascending positions -> (row group, its rows among them, counted inside the row group)."""
        if not len(ascending):
            return
        first, last = np.searchsorted(self.edges, ascending[[0, -1]], side="right") - 1
        bounds = np.searchsorted(ascending, self.edges[first : last + 2])
        for place, low, high in zip(range(first, last + 1), bounds[:-1], bounds[1:], strict=True):
            if low < high:
                yield int(self.groups[place]), ascending[low:high] - self.edges[place]

    def touched(self, pieces: Sequence[Piece]) -> list[int]:
        """Row groups that a sequence may read, each once, roughly in the order of the sequence."""
        found: dict[int, None] = {}
        for piece in pieces:
            if isinstance(piece, Span):
                first, last = np.searchsorted(self.edges, [piece.start, piece.stop - 1], side="right") - 1
                found.update(dict.fromkeys(self.groups[first : last + 1].tolist()))
            else:
                found.update(dict.fromkeys(self.touched(piece.pieces)))
        return list(found)


class Block(NamedTuple):
    """Consecutive batches that are assembled together.

    rows: ascending positions to read. order: (len(rows),) which of them comes first, second, ...; None: as they are.
    first_batch, num_batches: batches of the phase that it holds.
    """

    rows: np.ndarray
    order: np.ndarray | None
    first_batch: int
    num_batches: int


@dataclass(frozen=True)
class Phase:
    """A stretch of an epoch dealt under fixed settings.

    Attributes:
        epoch: from 0. number: from 0, counts the phases of this epoch.
        sequence: what was unread when the phase began.
        world_size, batch_size: W and B. shuffle_rows: rows of the shuffle buffer of a rank, 0 for no shuffle.
        permuted: whether this epoch's row groups are permuted; fixed when the epoch begins.
        seed: non-negative.
    """

    epoch: int
    number: int
    sequence: tuple[Piece, ...]
    world_size: int
    batch_size: int
    shuffle_rows: int
    permuted: bool
    seed: int

    @property
    def num_batches(self) -> int:
        """Batches of every rank."""
        longest = -(-length(self.sequence) // self.world_size)
        return -(-longest // self.batch_size)

    @property
    def block_rows(self) -> int:
        """S: rows of a block, a multiple of B."""
        rows = self.shuffle_rows or _PLAIN_BLOCK_ROWS
        return max(rows // self.batch_size, 1) * self.batch_size

    def rank_slice(self, rank: int) -> tuple[Piece, ...]:
        """What a rank reads, before blocks are shuffled."""
        rows = length(self.sequence)
        return cut(self.sequence, rows * rank // self.world_size, rows * (rank + 1) // self.world_size)

    def ordered(self, rank: int, start: int, stop: int) -> tuple[Piece, ...]:
        """Rows start .. stop-1 that a rank deals in this phase, as a sequence; shorter if the rank has fewer."""
        mine = self.rank_slice(rank)
        stop = min(stop, length(mine))
        if not self.shuffle_rows:
            return cut(mine, start, stop)
        result: list[Piece] = []
        size = self.block_rows
        for k in range(start // size, -(-stop // size)):
            pieces = cut(mine, k * size, (k + 1) * size)
            whole = Shuffled(pieces, (self.seed, self.epoch, self.number, rank, k), 0, length(pieces))
            result += cut([whole], start - k * size, stop - k * size)
        return tuple(result)

    def blocks(self, rank: int, first_batch: int = 0) -> Iterator[Block]:
        """What a rank deals from batch `first_batch` on; rows that are missing at the end are padding."""
        per_block = self.block_rows // self.batch_size
        batch = first_batch
        while batch < self.num_batches:
            end = min((batch // per_block + 1) * per_block, self.num_batches)
            pieces = self.ordered(rank, batch * self.batch_size, end * self.batch_size)
            yield Block(*_sorted_rows(pieces), batch, end - batch)
            batch = end

    def rest(self, finished: int) -> tuple[Piece, ...]:
        """What no rank has dealt after `finished` batches. Blocks not yet begun are left unshuffled."""
        result: list[Piece] = []
        for rank in range(self.world_size):
            mine = self.rank_slice(rank)
            begun = min(finished * self.batch_size, length(mine))
            whole = -(-begun // self.block_rows) * self.block_rows if self.shuffle_rows else begun
            result += self.ordered(rank, begun, whole)
            result += cut(mine, whole, length(mine))
        return tuple(result)


def _sorted_rows(pieces: tuple[Piece, ...]) -> tuple[np.ndarray, np.ndarray | None]:
    """A sequence as (ascending positions, the order in which to take them)."""
    # the usual block is one shuffled run: its rows are then known without sorting
    if len(pieces) == 1 and isinstance(pieces[0], Shuffled) and pieces[0].start == 0:
        block = pieces[0]
        rows = positions(block.pieces)
        if block.stop == len(rows) and (len(rows) < 2 or np.all(rows[1:] > rows[:-1])):
            return rows, permutation(block.key, len(rows))
    wanted = positions(pieces)
    if len(wanted) < 2 or np.all(wanted[1:] > wanted[:-1]):
        return wanted, None
    by_position = np.argsort(wanted)
    order = np.empty_like(by_position)
    order[by_position] = np.arange(len(wanted))
    return wanted[by_position], order


class Course:
    """All batches of one run over the data, from its start or from a cursor on; the same on every rank.

    sizes: rows of each row group. data: makes `footers.fingerprint`; called when a cursor is read or written. epochs:
    number of the epoch before which to stop, None for no end. cursor: what `cursor` returned, possibly in a run with
    other settings; DataError if it is from other data, another seed, or a numpy that shuffles differently.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        data: Callable[[], dict[str, int | str]],
        *,
        world_size: int,
        batch_size: int,
        shuffle_rows: int,
        seed: int,
        epochs: int | None,
        cursor: dict[str, Any] | None = None,
    ) -> None:
        self.sizes = np.asarray(sizes, np.int64)
        self.epochs = epochs
        self._data = data
        everything = (Span(0, int(self.sizes.sum())),)
        fresh = Phase(0, 0, everything, world_size, batch_size, shuffle_rows, shuffle_rows > 0, seed)
        self._fresh = fresh
        self._start, self._skip = fresh, 0
        if cursor is not None:
            self._start, self._skip = self._resume(cursor)

    def _resume(self, cursor: dict[str, Any]) -> tuple[Phase, int]:
        _check_cursor(cursor, self._data(), self._fresh.seed)
        old, finished = phase_from_json(cursor), cursor["finished"]
        if finished == 0 and old.number == 0:
            return replace(self._fresh, epoch=old.epoch), 0
        names = ("world_size", "batch_size", "shuffle_rows")
        now = {name: getattr(self._fresh, name) for name in names}
        if all(getattr(old, name) == value for name, value in now.items()):
            return old, finished
        return replace(old, number=old.number + 1, sequence=old.rest(finished), **now), 0

    @property
    def batches_left(self) -> int | None:
        """Batches of every rank from here to the end of the last epoch; None without end."""
        if self.epochs is None:
            return None
        later = self.epochs - self._start.epoch - 1
        return 0 if later < 0 else self._start.num_batches - self._skip + later * self._fresh.num_batches

    def at(self, batch: int) -> tuple[Phase, int]:
        """The phase of the batch-th batch of this run and which batch of that phase it is, both from 0."""
        batch += self._skip
        if batch < self._start.num_batches:
            return self._start, batch
        later, batch = divmod(batch - self._start.num_batches, self._fresh.num_batches)
        return replace(self._fresh, epoch=self._start.epoch + 1 + later), batch

    def rows_before(self, batch: int) -> int:
        """Rows of all ranks together from the start of epoch 0 to before the batch-th batch of this run; no padding."""
        phase, i = self.at(batch)
        sizes = [length(phase.rank_slice(rank)) for rank in range(phase.world_size)]
        total = int(self.sizes.sum())
        in_phase = sum(min(i * phase.batch_size, size) for size in sizes)
        return phase.epoch * total + total - length(phase.sequence) + in_phase

    def phases(self) -> Iterator[tuple[Phase, int]]:
        """The phases to read, in order, each with the batch to begin with."""
        phase, batch = self._start, self._skip
        while self.epochs is None or phase.epoch < self.epochs:
            yield phase, batch
            phase, batch = replace(self._fresh, epoch=phase.epoch + 1), 0

    def order(self, phase: Phase) -> EpochOrder:
        """The row groups of the phase's epoch."""
        return EpochOrder(self.sizes, phase.seed, phase.epoch, phase.permuted)

    def cursor(self, batches_finished: int) -> dict[str, Any]:
        """JSON-able: where to go on when that many batches of this run are finished on every rank."""
        phase, finished = self.at(batches_finished)
        return {"version": _CURSOR_VERSION, "finished": finished, **_phase_to_json(phase), "data": self._data(),
                "shuffle_probe": _shuffle_probe()}  # fmt: skip


def _shuffle_probe() -> list[int]:
    """Differs if numpy ever changes how it permutes, which would move rows under an old cursor."""
    return permutation((0, 1), 12).tolist()


def _check_cursor(cursor: dict[str, Any], data: dict[str, int | str], seed: int) -> None:
    start_new = "or start a new run from the checkpoint's weights"
    if cursor.get("version") != _CURSOR_VERSION:
        raise DataError(
            f"the data cursor has version {cursor.get('version')!r}, this program reads {_CURSOR_VERSION}; resume with "
            f"the dist_rec that wrote it, {start_new}"
        )
    changed = [f"{k} {cursor['data'].get(k)} -> {v}" for k, v in data.items() if cursor["data"].get(k) != v]
    if changed:
        raise DataError(
            f"the training data changed since the checkpoint ({'; '.join(changed)}), so its position in the epoch has "
            f"no meaning here; give the same files, {start_new}"
        )
    if cursor["seed"] != seed:
        raise DataError(
            f"the checkpoint's data order was drawn with seed {cursor['seed']}, the config has {seed}: rows would "
            f"repeat or be lost; set the seed to {cursor['seed']}, {start_new}"
        )
    if cursor["shuffle_probe"] != _shuffle_probe():
        raise DataError(
            f"numpy {np.__version__} permutes differently from the one that wrote the checkpoint: rows would repeat "
            f"or be lost; use that numpy, {start_new}"
        )


def _phase_to_json(phase: Phase) -> dict[str, Any]:
    return {
        "epoch": phase.epoch,
        "phase": phase.number,
        "sequence": [_piece_to_json(piece) for piece in phase.sequence],
        "world_size": phase.world_size,
        "batch_size": phase.batch_size,
        "shuffle_rows": phase.shuffle_rows,
        "permuted": phase.permuted,
        "seed": phase.seed,
    }


def phase_from_json(value: dict[str, Any]) -> Phase:
    """The phase in a cursor."""
    names = ("world_size", "batch_size", "shuffle_rows", "permuted", "seed")
    sequence = tuple(_piece_from_json(piece) for piece in value["sequence"])
    return Phase(value["epoch"], value["phase"], sequence, *(value[name] for name in names))


def _piece_to_json(piece: Piece) -> list:
    if isinstance(piece, Span):
        return [piece.start, piece.stop]
    return [piece.start, piece.stop, list(piece.key), [_piece_to_json(inner) for inner in piece.pieces]]


def _piece_from_json(value: list) -> Piece:
    if len(value) == 2:
        return Span(*value)
    start, stop, key, pieces = value
    return Shuffled(tuple(_piece_from_json(inner) for inner in pieces), tuple(key), start, stop)
