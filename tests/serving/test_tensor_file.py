"""Tensor files: what is written block by block is read back bit for bit, and a damaged file is never believed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from dist_rec.serving.tensor_file import TensorFileError, TensorFileWriter, read

TENSORS = {
    "b": torch.tensor([True, False, True]),
    "wide": torch.arange(12, dtype=torch.float64).reshape(3, 4),
    "table": torch.randn(1000, 3),
    "scalar": torch.tensor(2.5),
    "count": torch.tensor(7),
    "none": torch.empty(0, 4),
}


def _write(path: Path, tensors: dict[str, torch.Tensor] = TENSORS, rows: int = 64) -> Path:
    specs = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    with TensorFileWriter(path, specs, {"step": "3"}) as writer:
        for name in writer.names:
            for block in tensors[name].split(rows) if tensors[name].dim() else [tensors[name]]:
                writer.write(name, block)
    return path


def test_what_is_written_is_read(tmp_path):
    found = read(_write(tmp_path / "a"))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_the_layout_is_that_of_safetensors(tmp_path):
    """Read here by its specification alone: 8 bytes, JSON, values without holes."""
    content = _write(tmp_path / "a").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__") == {"step": "3"}
    entry = header["table"]
    assert (entry["dtype"], entry["shape"]) == ("F32", [1000, 3])
    values = content[8 + length :][slice(*entry["data_offsets"])]
    assert torch.equal(torch.frombuffer(bytearray(values), dtype=torch.float32).view(1000, 3), TENSORS["table"])
    places = sorted(e["data_offsets"] for e in header.values())
    assert places[0][0] == 0 and places[-1][1] == len(content) - 8 - length
    assert all(a[1] == b[0] for a, b in pairwise(places))


def test_it_is_a_map_of_the_file_and_writing_to_it_leaves_the_file(tmp_path):
    path = _write(tmp_path / "a")
    before, table = path.read_bytes(), read(path)["table"]
    assert is_mapped(table, path)
    table[0, 0] += 1
    assert path.read_bytes() == before


def is_mapped(tensor: torch.Tensor, path: Path) -> bool:
    """Whether a tensor's values are pages of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(x, 16) for x in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return line.endswith(str(path))
    return False


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "its header describes"),
        (lambda b: b + b"0", "its header describes"),
        (lambda b: b[:100], "a header of"),
        (lambda b: b[:5], "a header of"),
        (lambda b: b.replace(b'"F32"', b'"F99"', 1), "its header cannot be read"),
        (lambda b: b.replace(b"[1000, 3]", b"[1001, 3]", 1), "tensor table does not fill its place"),
        (lambda b: b"\xff" * 8 + b[8:], "a header of"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    path = _write(tmp_path / "a")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(TensorFileError, match=message) as error:
        read(path)
    assert str(path) in str(error.value) and "export the model again" in str(error.value)
    with pytest.raises(TensorFileError, match="is missing"):
        read(tmp_path / "b")


def test_what_is_not_written_as_announced_is_refused(tmp_path):
    specs = {"a": (torch.float32, (4, 2)), "b": (torch.float32, (2,))}
    with pytest.raises(ValueError, match="not written to the end: b"), TensorFileWriter(tmp_path / "x", specs, {}) as w:
        w.write("a", torch.zeros(4, 2))
    with TensorFileWriter(tmp_path / "y", specs, {}) as w:
        w.write("a", torch.zeros(2, 2))
        with pytest.raises(
            ValueError, match="8 bytes for b, which takes those from 32 to 40, when 16 bytes are written"
        ):
            w.write("b", torch.zeros(2))
        with pytest.raises(ValueError, match="20 bytes for a, which takes those from 16 to 32"):
            w.write("a", torch.zeros(5))
        w.write("a", torch.zeros(4))
        w.write("b", torch.zeros(2))
