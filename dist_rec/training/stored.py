"""The tensors of a checkpoint, read by blocks of rows: one process, no process group, never a whole table in memory."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from dist_rec.training.checkpoint import CheckpointError


@dataclass(frozen=True)
class _Shard:
    """One piece of a tensor: its first index in each dimension, its size, and where its bytes lie."""

    start: tuple[int, ...]
    size: tuple[int, ...]
    file: BinaryIO
    first_byte: int

    @property
    def stop_row(self) -> int:
        return self.start[0] + self.size[0]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a checkpoint, in as many pieces as ranks saved it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shards: tuple[_Shard, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def whole(self) -> Tensor:
        """All of it in memory, for tensors that are no tables."""
        if not self.shape:
            return _read(self.shards[0], 0, 1, self.dtype).reshape(())
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """(stop - start, ...): the rows from `start` to before `stop`, of all columns."""
        result = torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype)
        for shard in self.shards:
            low, high = max(start, shard.start[0]), min(stop, shard.stop_row)
            if low < high:
                inner = tuple(slice(s, s + n) for s, n in zip(shard.start[1:], shard.size[1:], strict=True))
                part = _read(shard, low - shard.start[0], high - shard.start[0], self.dtype)
                result[(slice(low - start, high - start), *inner)] = part
        return result

    def blocks(self, num_bytes: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive rows that take about `num_bytes` each, at least one row."""
        if not self.shape:
            return
        rows = max(1, num_bytes // max(1, math.prod(self.shape[1:]) * self.dtype.itemsize))
        for start in range(0, self.shape[0], rows):
            yield start, min(start + rows, self.shape[0])


def _read(shard: _Shard, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start..stop-1 of a shard; a scalar counts as one row."""
    inner = shard.size[1:]
    row_bytes = math.prod(inner) * dtype.itemsize
    buffer = bytearray((stop - start) * row_bytes)
    view, done = memoryview(buffer), 0
    while done < len(buffer):  # one call reads 2 GiB at most
        count = os.preadv(shard.file.fileno(), [view[done:]], shard.first_byte + start * row_bytes + done)
        if count == 0:
            raise CheckpointError(f"{shard.file.name} ends before its tensors do; restore it, or use another step")
        done += count
    if not buffer:
        return torch.empty((stop - start, *inner), dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).reshape(stop - start, *inner)


class StoredModel:
    """The model's tensors in a checkpoint folder, by the names of `state_dict()`. Close it, or use it in a `with`.

    The files stay open meanwhile, so that a training that goes on may remove the checkpoint.

    Args:
        folder: of a complete checkpoint, as `checkpoint.find` has checked it.

    Raises:
        CheckpointError: a file does not hold what torch.distributed.checkpoint wrote.
    """

    def __init__(self, folder: Path) -> None:
        metadata = dcp.FileSystemReader(folder).read_metadata()
        places = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}
        names = sorted({info.relative_path for info in places.values()})
        self.tensors: dict[str, StoredTensor] = {}
        self._open = ExitStack()
        with ExitStack() as opening:
            files = {name: opening.enter_context(open(folder / name, "rb")) for name in names}
            for key, entry in metadata.state_dict_metadata.items():
                room, _, name = key.partition(".")
                if room == "model" and isinstance(entry, TensorStorageMetadata):
                    # a rank without a row of a small table saved an empty shard
                    chunks = [chunk for chunk in entry.chunks if math.prod(chunk.sizes)]
                    here = [(chunk, places[key, chunk.offsets]) for chunk in chunks]
                    dtype = entry.properties.dtype
                    shards = [_shard(files[at.relative_path], at.offset, at.length, chunk, dtype) for chunk, at in here]
                    self.tensors[name] = StoredTensor(name, tuple(entry.size), dtype, tuple(shards))
            self._open = opening.pop_all()

    def __enter__(self) -> StoredModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files."""
        self._open.close()


def _shard(file: Any, offset: int, length: int, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> _Shard:
    """Where in `file` the values lie of the tensor that `torch.save` wrote at `offset`; none of them is read."""
    try:
        with FakeTensorMode():  # has torch.load note the place instead of reading
            tensor = torch.load(_create_file_view(file, offset, length), weights_only=True)  # type: ignore[arg-type]
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file.name} is damaged ({error}); restore it, or use another step") from error
    inside = tensor.untyped_storage()._checkpoint_offset
    if tensor.shape != chunk.sizes or tensor.dtype != dtype or not tensor.is_contiguous() or inside is None:
        found = f"{list(tensor.shape)} {tensor.dtype} with strides {tensor.stride()}"
        raise CheckpointError(
            f"{file.name}: {found} where {list(chunk.sizes)} {dtype} was saved, row by row; save again"
        )
    first_byte = offset + inside + tensor.storage_offset() * dtype.itemsize
    return _Shard(tuple(chunk.offsets), tuple(chunk.sizes), file, first_byte)
