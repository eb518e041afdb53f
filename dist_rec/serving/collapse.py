"""From a training checkpoint to the tensors that are served: one layer per table, nothing that only training needs.

Every tensor of the served model must be in the checkpoint, and every tensor of the checkpoint must be served, dropped
by the rule `DROPPED`, or be the second layer of a table. Tables pass through in blocks of rows. Letters: n rows of a
table, k its inner width, d its served width.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dist_rec.embeddings.stage import second_layer_of
from dist_rec.serving.tensor_file import TensorFileWriter
from dist_rec.settings import Complaint
from dist_rec.training.checkpoint import CheckpointError
from dist_rec.training.stored import StoredModel, StoredTensor

BLOCK_BYTES = 8 * 2**20  # of a table's first layer in memory; beside it its product and both in double precision
DROPPED = ("dense.auxiliaries.", "dense.objective.")
"""Parameters whose names begin so serve training only."""
_SHOWN = 8


@dataclass
class ExportConfig:
    """The `export` section: what `dist-rec export` writes, and where."""

    step: int | None = None  # which checkpoint; default: the best one if early stopping noted one, else the newest
    path: str | None = None  # the folder to write; default: <run.dir>/export
    # of a model that is judged by retrieval: FAISS's description of the index over the items, such as HNSW32 or
    # IVF1024,Flat; auto compares with all items up to 50,000 and uses an inverted file beyond; none writes no index
    index: str = "auto"
    probes: int = 32  # lists of an inverted file that a search reads
    recall_at: int = 10  # K at which the index is compared with exact search
    recall_queries: int = 1000  # rows of the first of validation, test and train that are searched for that

    def check(self) -> Iterator[Complaint]:
        """Complaints about the settings themselves."""
        for name in ("probes", "recall_at", "recall_queries"):
            if getattr(self, name) < 1:
                yield Complaint(name, f"is {getattr(self, name)}; use at least 1")


@dataclass(frozen=True)
class TableError:
    """How well a two-layer table was collapsed, over all its rows.

    Attributes:
        max_error: the largest |W1 W2 - E|, the product in double precision, E as it was written.
        std: standard deviation of E.
        bytes_before, bytes_after: of both layers, and of E.
    """

    table: str
    rows: int
    inner_dim: int
    dim: int
    max_error: float
    std: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Collapsed:
    """What became of a checkpoint. tables: the two-layer ones. dropped: names of tensors that are not served."""

    tables: list[TableError]
    dropped: list[str]
    bytes_after: int


def collapse(
    stored: StoredModel,
    served: Mapping[str, Tensor],
    path: Path,
    metadata: Mapping[str, str],
    others: Collection[str] = (),
) -> Collapsed:
    """Writes the tensors `served` (only their shapes and types are looked at) from a checkpoint to a tensor file.

    others: names of tensors that another part of the export serves.

    Raises:
        CheckpointError: a tensor is missing in the checkpoint, has another shape or type, or has no place in the model.
    """
    seconds = {name: stored.tensors.get(second_layer_of(name) or "") for name in served}
    elsewhere = {*others, *(layer for name in others if (layer := second_layer_of(name)) is not None)}
    known = {s.name for s in seconds.values() if s is not None} | elsewhere
    dropped = _check(stored.tensors, served, known)
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in served.items()}
    tables = []
    with TensorFileWriter(path, specs, metadata) as writer:
        for name in writer.names:
            first, second = stored.tensors[name], seconds[name]
            if second is not None:
                tables.append(_write_product(writer, first, second))
            elif not first.shape:
                writer.write(name, first.whole())
            else:
                for start, stop in first.blocks(BLOCK_BYTES):
                    writer.write(name, first.rows(start, stop))
    return Collapsed(tables, dropped, sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values()))


def _check(stored: Mapping[str, StoredTensor], served: Mapping[str, Tensor], known: set[str]) -> list[str]:
    """The names that are dropped. known: others that have their place."""
    problems = []
    for name, tensor in served.items():
        shape = _served_shape(stored, name)
        if shape is None:
            problems.append(f"{name} is not in the checkpoint")
        elif shape != tuple(tensor.shape) or stored[name].dtype != tensor.dtype:
            found = f"{list(shape)} {stored[name].dtype}"
            problems.append(f"{name} is {found}, the model has {list(tensor.shape)} {tensor.dtype}")
    dropped = [name for name in stored if name.startswith(DROPPED)]
    for name in stored.keys() - served.keys() - known - set(dropped):
        problems.append(f"{name} of the checkpoint has no place in the model")
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        listing = "\n".join(f"  {p}" for p in [*sorted(problems)[:_SHOWN], *more])
        raise CheckpointError(f"the checkpoint is not one of this config's model:\n{listing}")
    return sorted(dropped)


def _served_shape(stored: Mapping[str, StoredTensor], name: str) -> tuple[int, ...] | None:
    if name not in stored:
        return None
    second = stored.get(second_layer_of(name) or "")
    if second is None:
        return stored[name].shape
    rows, inner = stored[name].shape
    return (rows, second.shape[1]) if inner == second.shape[0] else stored[name].shape


def _write_product(writer: TensorFileWriter, first: StoredTensor, second: StoredTensor) -> TableError:
    """Writes E = W1 W2, computed in float32, block by block, and compares it with the product in float64."""
    w2 = second.whole()
    w2_double = w2.double()
    worst, total, squares = 0.0, 0.0, 0.0
    for start, stop in first.blocks(BLOCK_BYTES):
        w1 = first.rows(start, stop)
        e = w1 @ w2
        writer.write(first.name, e)
        exact = w1.double() @ w2_double
        worst = max(worst, (exact - e).abs().max().item())
        total += exact.sum().item()
        squares += exact.square().sum().item()
    rows, dim = first.shape[0], w2.shape[1]
    mean = total / (rows * dim)
    return TableError(
        table=second.name.rpartition(".")[2],
        rows=rows,
        inner_dim=w2.shape[0],
        dim=dim,
        max_error=worst,
        std=max(squares / (rows * dim) - mean**2, 0.0) ** 0.5,
        bytes_before=first.num_bytes + second.num_bytes,
        bytes_after=rows * dim * w2.dtype.itemsize,
    )


def format_report(collapsed: Collapsed) -> Iterator[str]:
    """The report as lines of text."""
    if collapsed.tables:
        rows = [("table", "rows", "k", "d", "max error", "std", "MiB before", "MiB after")]
        rows += [
            (t.table, f"{t.rows:,}", str(t.inner_dim), str(t.dim), f"{t.max_error:.2e}", f"{t.std:.3e}",
             f"{t.bytes_before / 2**20:.2f}", f"{t.bytes_after / 2**20:.2f}")
            for t in collapsed.tables
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            yield "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        yield "max error: the largest difference between an entry as written and the product of the layers in float64"
    if collapsed.dropped:
        yield f"not served, {len(collapsed.dropped)} tensors: {', '.join(collapsed.dropped)}"
    yield f"{collapsed.bytes_after / 2**20:.2f} MiB"
