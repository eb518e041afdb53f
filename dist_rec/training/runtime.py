"""The process: its rank, its device and its process groups. What differs between CPU and CUDA is decided here."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torchrec.distributed import comm

from dist_rec.settings import Complaint, ConfigError

T = TypeVar("T")


@dataclass
class RunSettings:
    """The `run` section."""

    dir: str = "runs/default"  # everything the run leaves behind goes here
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: CUDA where torch finds a GPU and fbgemm-gpu is installed
    timeout_minutes: float = 10.0  # a collective that takes longer ends the job

    @property
    def device_type(self) -> str:
        """The device a process of this config gets on this machine."""
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() and has_cuda_kernels() else "cpu"
        return self.device

    def check(self) -> Iterator[Complaint]:
        """Complaints about a device that is not there, a bad seed, and a folder that cannot be written."""
        if self.device == "cuda" and not torch.cuda.is_available():
            yield Complaint("device", "is cuda, but torch finds no GPU; use cpu or auto, or install the cuda variant")
        elif self.device == "cuda" and not has_cuda_kernels():
            yield Complaint("device", "is cuda, but the installed fbgemm is the CPU build; run scripts/setup cuda")
        if self.seed < 0:
            yield Complaint("seed", f"is {self.seed}; use a number >= 0")
        if not self.timeout_minutes > 0:
            yield Complaint("timeout_minutes", f"is {self.timeout_minutes}; use a number of minutes > 0")
        yield from check_writable(Path(self.dir), "dir")


def has_cuda_kernels() -> bool:
    """Whether the installed fbgemm is the build with CUDA kernels: the CPU build is another distribution."""
    return any(importlib.metadata.distributions(name="fbgemm-gpu"))


def check_writable(folder: Path, key: str) -> Iterator[Complaint]:
    """A complaint about `key` if no file can be made in `folder` or, if it is not there yet, where it would be made."""
    existing = next((p for p in (folder, *folder.parents) if p.exists()), Path("."))
    if not existing.is_dir():
        yield Complaint(key, f"is '{folder}', but '{existing}' is a file; name a folder")
        return
    try:  # asking for permissions would not do: root has them all, and a full or read-only disk refuses root too
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"0")
    except OSError as error:
        text = f"is '{folder}', but '{existing}' cannot be written ({error.strerror}); choose another folder"
        yield Complaint(key, text)


@dataclass(frozen=True)
class Runtime:
    """One process of the job.

    Attributes:
        group: the default process group: NCCL on CUDA, gloo on CPU.
        control: a gloo group for host-side values (metrics, verdicts), so that they never wait for a GPU stream.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    group: dist.ProcessGroup
    control: dist.ProcessGroup

    @property
    def device_memory(self) -> int | None:
        """Bytes of memory that the device has, for the planner; None on CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None

    @property
    def host_memory(self) -> int:
        """This rank's share of the host's memory in bytes, for the planner."""
        return host_memory() // self.local_world_size

    @property
    def cores(self) -> int:
        """This rank's share of the CPU cores."""
        return max(1, len(os.sched_getaffinity(0)) // self.local_world_size)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value` on every rank (any picklable object)."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def from_main(self, work: Callable[[], T], error_type: type[Exception]) -> T:
        """What `work` returns on rank 0, on every rank (any picklable object). Collective; it may take hours.

        Raises what `work` raised, so that nobody waits for an answer that does not come: an `error_type` on every rank;
        anything else as it is on rank 0, and as an `error_type` on the others.
        """
        answer: Any = None
        error: Exception | None = None
        if self.is_main:
            try:
                answer = work()
            except Exception as raised:  # noqa: BLE001 - raised again below, when nobody waits for the answer any more
                error = raised
        told = error if error is None or isinstance(error, error_type) else error_type(f"rank 0 failed: {error!r}")
        answer, told = self.broadcast((answer, told))
        if error is not None:
            raise error
        if told is not None:
            raise told
        return answer

    def gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank, on every rank (any picklable objects)."""
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, value, group=self.control)
        return every

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' `values`, tensors of one shape, on every rank and on the host."""
        result = values.cpu().clone()
        dist.all_reduce(result, group=self.control)
        return result

    def total(self, counts: Mapping[str, int]) -> dict[str, int]:
        """Counts of all ranks added up, on every rank."""
        every = self.gather(dict(counts))
        names = sorted({name for part in every for name in part})
        return {name: sum(part.get(name, 0) for part in every) for name in names}

    def all_true(self, flag: torch.Tensor) -> bool:
        """Whether `flag` (a 0-d bool tensor on the device) holds on every rank; one small all-reduce."""
        if self.world_size == 1:
            return bool(flag)
        failed = (~flag).to(torch.int32)
        dist.all_reduce(failed, group=self.group)
        return failed.item() == 0


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_HOST_WORK = timedelta(hours=4)
_LOCAL = (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))


def rank_from_environment() -> int:
    """This process's rank as the launcher says it; 0 without a launcher."""
    return int(os.environ.get("RANK", "0"))


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of memory that the machine has or, where that is less, that the control groups of this process allow.

    root: where /proc and /sys lie.
    """
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, name = ("memory", "memory.limit_in_bytes") if controllers else ("", "memory.max")
        here = Path(path.lstrip("/"))
        # in a container the path may be the host's, which is not there: its own group is the mount itself, the last one
        for limit in (root / "sys/fs/cgroup" / mount / folder / name for folder in (here, *here.parents)):
            text = limit.read_text().strip() if limit.is_file() else ""
            found = min(found, int(text)) if text.isdigit() else found  # "max": no limit
    return found


def keep_freed_memory() -> None:
    """Lets glibc keep what a step has freed for the next step.

    By itself it gives a step's large tensors back to the kernel and faults every page in again: 1.2 to 1.6 times slower
    training on CPU (26 tables x 64 columns, batch 4096). Other C libraries have no such switch and are left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def process(settings: RunSettings) -> Iterator[Runtime]:
    """The process groups of the job: torchrun's environment where there is one, a single rank otherwise.

    A default process group that exists already (a notebook's, a test's) is used and left as it was.

    Raises:
        ConfigError: more ranks were started on this machine than it has GPUs.
    """
    cuda = settings.device_type == "cuda"
    local_rank, local_world_size = (int(os.environ.get(name, value)) for name, value in _LOCAL)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if not cuda:
        keep_freed_memory()
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)  # as torchrun has it: threads of ranks or of neighbours would wait for each other
    else:
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            text = f"is cuda for {local_world_size} ranks on a machine with {gpus} GPU(s); start one rank per GPU"
            raise ConfigError([Complaint("run.device", text)])
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=settings.timeout_minutes)
    ours, failed = not dist.is_initialized(), True
    if ours:
        # with device_id NCCL connects at once, so that a GPU that cannot be reached fails here
        common: dict[str, Any] = {"backend": "nccl" if cuda else "gloo", "device_id": device if cuda else None}
        # not MASTER_ADDR, which shells of clusters and notebooks have without a launcher
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            dist.init_process_group(timeout=timeout, **common)
        else:  # no launcher: a store of our own needs no port
            os.environ.setdefault("LOCAL_WORLD_SIZE", "1")  # TorchRec asks for it
            dist.init_process_group(timeout=timeout, store=dist.HashStore(), rank=0, world_size=1, **common)
    try:
        group = dist.group.WORLD
        assert group is not None
        # rank 0 may sort a large evaluation or read many footers while the others wait for what it says
        control = dist.new_group(backend="gloo", timeout=max(timeout, _HOST_WORK))
        yield Runtime(dist.get_rank(), dist.get_world_size(), local_world_size, device, group, control)
        failed = False
    finally:
        # NCCL's clean-up waits for ranks that may wait for this one: a failing rank leaves without it, and its error
        # reaches the launcher
        if ours and (not failed or dist.get_world_size() == 1):
            dist.destroy_process_group()
            comm._INTRA_PG = comm._CROSS_PG = None  # TorchRec's groups of nodes, which it would use in the next job too
