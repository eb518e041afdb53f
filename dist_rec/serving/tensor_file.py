"""Named tensors in one file, in the safetensors format: written in blocks, read through a memory map.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape, first and last byte),
and the values end to end, little-endian, row by row (github.com/huggingface/safetensors). Any safetensors library reads
it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_CODES = {
    torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_ALIGNMENT = 64  # bytes; the values begin at a multiple of it


class TensorFileError(ValueError):
    """A file that is not what it should be; the message names the file, what is wrong and the fix."""


class TensorFileWriter:
    """Writes a tensor file block by block; a context manager. What is complete lies safely on disk at its end.

    Args:
        path: of a new file.
        specs: name -> (dtype, shape) of every tensor.
        metadata: texts that the header takes along.

    Attributes:
        names: the order in which the tensors have to be written.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        # the format allows no holes: wide types first keeps every tensor aligned
        self.names = sorted(specs, key=lambda name: (-specs[name][0].itemsize, name))
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        self._places: dict[str, tuple[int, int]] = {}  # of the bytes that are still to come
        self._written = start = 0
        for name in self.names:
            dtype, shape = specs[name]
            stop = start + math.prod(shape) * dtype.itemsize
            self._places[name] = (start, stop)
            header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)
        self._file = open(path, "xb")  # noqa: SIM115 - closed by __exit__
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, block: Tensor) -> None:
        """The next values of tensor `name`, which comes after all those before it in `names` are complete."""
        values = block.contiguous().reshape(-1).view(torch.uint8)
        place, stop = self._places[name]
        if len(values) and (place != self._written or place + len(values) > stop):
            text = f"{len(values)} bytes for {name}, which takes those from {place} to {stop}"
            raise ValueError(f"{text}, when {self._written} bytes are written")
        self._written += len(values)
        self._places[name] = (self._written, stop)
        self._file.write(values.numpy().data)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file as file:
            if kind is not None:
                return
            missing = [name for name, (place, stop) in self._places.items() if place < stop]
            if missing:
                raise ValueError(f"not written to the end: {', '.join(missing)}")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file, by name. They are views of a private memory map: read from disk where they are used.

    Raises:
        TensorFileError: the file is missing, cut short, or its header says what the file cannot hold.
    """
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise TensorFileError(f"{path} is missing; export the model again")
    again = "the file is damaged or cut short: copy it again, or export the model again"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise TensorFileError(f"{path}: a header of {length} bytes in a file of {size}; {again}")
        try:
            header = json.loads(file.read(length))
            entries = {name: _Entry(value) for name, value in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TensorFileError(f"{path}: its header cannot be read ({error!r}); {again}") from error
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != end or entry.stop - entry.start != math.prod(entry.shape) * entry.dtype.itemsize:
            raise TensorFileError(f"{path}: tensor {name} does not fill its place; {again}")
        end = entry.stop
    if 8 + length + end != size:
        raise TensorFileError(f"{path}: has {size} bytes, its header describes {8 + length + end}; {again}")
    everything = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    return {name: entry.view(everything[8 + length :]) for name, entry in entries.items()}


class _Entry:
    """What the header says of one tensor."""

    def __init__(self, value: Mapping[str, Any]) -> None:
        self.dtype = _DTYPES[value["dtype"]]
        self.shape = [int(n) for n in value["shape"]]
        self.start, self.stop = (int(n) for n in value["data_offsets"])

    def view(self, values: Tensor) -> Tensor:
        part = values[self.start : self.stop]
        if (part.storage_offset()) % self.dtype.itemsize:
            part = part.clone()  # another program's file need not be aligned
        return part.view(self.dtype).reshape(self.shape)
