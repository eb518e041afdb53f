"""What a process sends: the calls of torch.distributed that Python code makes, and the bytes that the kernel takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor


class Call(NamedTuple):
    """One collective of this rank.

    Attributes:
        name: of the function in torch.distributed. ranks: of its group. is_float: looked-up vectors and gradients, not
            ids and lengths.
        given, taken: bytes of its input and of its output.
        sent: bytes that leave the rank with the usual algorithms: what an all-to-all has for others; all parts but its
            own of what a ring reduce-scatters; its own part once for each other rank that a ring gathers it for.
    """

    name: str
    ranks: int
    is_float: bool
    given: int
    taken: int
    sent: int


@contextmanager
def calls() -> Iterator[list[Call]]:
    """Collects the all-to-alls, reduce-scatters and all-gathers that are begun meanwhile, TorchRec's all among them.

    DistributedDataParallel sums gradients from C++ and is not seen.
    """
    found: list[Call] = []
    original = {name: getattr(dist, name) for name in _KINDS}

    def counted(name: str, call: Callable) -> Callable:
        @wraps(call)
        def wrapper(output: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
            found.append(_call(name, output, input, args, kwargs))
            return call(output, input, *args, **kwargs)

        return wrapper

    try:
        for name, call in original.items():
            setattr(dist, name, counted(name, call))
        yield found
    finally:
        for name, call in original.items():
            setattr(dist, name, call)


_KINDS = {
    "all_to_all_single": "exchange",
    "reduce_scatter": "reduce",
    "reduce_scatter_tensor": "reduce",
    "all_gather": "gather",
    "all_gather_into_tensor": "gather",
}


def _call(name: str, output: Any, input: Any, args: tuple, kwargs: dict[str, Any]) -> Call:
    group = kwargs.get("group")
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    given, taken = _bytes(input), _bytes(output)
    if _KINDS[name] == "gather":
        sent = given * (ranks - 1)
    elif _KINDS[name] == "reduce":
        sent = given * (ranks - 1) // ranks
    else:
        splits = kwargs.get("input_split_sizes") or (args[1] if len(args) > 1 else None)
        rows = sum(splits) if splits else ranks
        own = splits[rank] if splits else 1
        sent = given * (rows - own) // rows if rows else 0
    first = input[0] if isinstance(input, list | tuple) else input
    return Call(name, ranks, first.is_floating_point(), given, taken, sent)


def _bytes(value: Tensor | list[Tensor]) -> int:
    return sum(t.nbytes for t in value) if isinstance(value, list | tuple) else value.nbytes


def written() -> int:
    """Bytes that this process has handed to the kernel so far, for files and sockets: gloo's messages among them."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("wchar"))
