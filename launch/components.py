"""TorchX components for the entries of dist_rec, each over `torchx.components.dist.ddp`.

`torchx run -s SCHEDULER launch/components.py:train --config CONFIG --ranks 2 -- key=value ...` ends in the same process
arguments as `torchrun --nproc-per-node 2 -m dist_rec.train CONFIG key=value ...`.
"""

# TorchX decodes command line values by these annotations. It takes them as objects, so no `from __future__ import
# annotations`, and of the generic ones it knows Optional, Dict and List only.
# ruff: noqa: UP006, UP035, UP045

from typing import Any, Dict, List, Optional

import torchx
from torchx import specs
from torchx.components import dist

# OMP_NUM_THREADS: ranks share a node's cores, and threads of their own would only fight over them.
# PYTHONUNBUFFERED: a rank writes to a file that torchrun follows; buffered, its lines would come in blocks.
ENV = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
CORES, MEMORY_MB = 4, 16384  # for each rank: its training thread, and those that read ahead


def train(
    *overrides: str,
    config: str,
    ranks: int = 1,
    nodes: int = 1,
    name: str = "/",
    image: str = torchx.IMAGE,
    cpu: Optional[int] = None,
    gpu: int = 0,
    memMB: Optional[int] = None,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
    debug: bool = False,
) -> specs.AppDef:
    """Trains: `python -m dist_rec.train CONFIG key=value ...` on every rank.

    Args:
        overrides: settings as key=value, after `--`
        config: YAML file, as seen from where the ranks run
        ranks: processes per node; on GPU nodes, one per GPU
        nodes: number of nodes
        name: {experiment}/{run}, as in TorchX's dist.ddp
        image: container image for Kubernetes and AWS Batch, built from docker/Dockerfile
        cpu: CPU cores per node; default: 4 for each rank on it
        gpu: GPUs per node
        memMB: host memory per node in MB; default: 16384 for each rank on it
        h: a named resource of TorchX, in place of cpu, gpu and memMB
        env: environment variables (k1=v1,k2=v2)
        max_retries: restarts by the scheduler; a restarted run resumes from its last checkpoint
        rdzv_port: port on the first node where the nodes of a job meet
        mounts: mounts of the container (type=bind,src=/host,dst=/container[,readonly])
        debug: with the debug flags of torch.distributed and NCCL
    """
    return _ddp("dist_rec.train", **locals())


def evaluate(
    *overrides: str,
    config: str,
    ranks: int = 1,
    nodes: int = 1,
    name: str = "/",
    image: str = torchx.IMAGE,
    cpu: Optional[int] = None,
    gpu: int = 0,
    memMB: Optional[int] = None,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
    debug: bool = False,
) -> specs.AppDef:
    """Evaluates a checkpoint: `python -m dist_rec.evaluate CONFIG key=value ...` on every rank.

    Args:
        overrides: settings as key=value, after `--`
        config: YAML file, as seen from where the ranks run
        ranks: processes per node; on GPU nodes, one per GPU
        nodes: number of nodes
        name: {experiment}/{run}, as in TorchX's dist.ddp
        image: container image for Kubernetes and AWS Batch, built from docker/Dockerfile
        cpu: CPU cores per node; default: 4 for each rank on it
        gpu: GPUs per node
        memMB: host memory per node in MB; default: 16384 for each rank on it
        h: a named resource of TorchX, in place of cpu, gpu and memMB
        env: environment variables (k1=v1,k2=v2)
        max_retries: restarts by the scheduler
        rdzv_port: port on the first node where the nodes of a job meet
        mounts: mounts of the container (type=bind,src=/host,dst=/container[,readonly])
        debug: with the debug flags of torch.distributed and NCCL
    """
    return _ddp("dist_rec.evaluate", **locals())


def cohorts(
    *overrides: str,
    run: str,
    data: str,
    ranks: int = 1,
    nodes: int = 1,
    name: str = "/",
    image: str = torchx.IMAGE,
    cpu: Optional[int] = None,
    gpu: int = 0,
    memMB: Optional[int] = None,
    h: Optional[str] = None,
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
    mounts: Optional[List[str]] = None,
    debug: bool = False,
) -> specs.AppDef:
    """Finds the cohorts that a run treats most differently: `python -m dist_rec.cohorts RUN DATA key=value ...`.

    Args:
        overrides: options and settings as key=value, after `--`
        run: folder of a trained run, as seen from where the ranks run
        data: file, folder or glob of Parquet, likewise
        ranks: processes per node; on GPU nodes, one per GPU
        nodes: number of nodes
        name: {experiment}/{run}, as in TorchX's dist.ddp
        image: container image for Kubernetes and AWS Batch, built from docker/Dockerfile
        cpu: CPU cores per node; default: 4 for each rank on it
        gpu: GPUs per node
        memMB: host memory per node in MB; default: 16384 for each rank on it
        h: a named resource of TorchX, in place of cpu, gpu and memMB
        env: environment variables (k1=v1,k2=v2)
        max_retries: restarts by the scheduler
        rdzv_port: port on the first node where the nodes of a job meet
        mounts: mounts of the container (type=bind,src=/host,dst=/container[,readonly])
        debug: with the debug flags of torch.distributed and NCCL
    """
    return _ddp("dist_rec.cohorts", **locals())


def _ddp(
    module: str,
    overrides: tuple[str, ...],
    ranks: int,
    nodes: int,
    env: dict[str, str] | None,
    cpu: int | None = None,
    memMB: int | None = None,
    config: str = "",
    run: str = "",
    data: str = "",
    **resources: Any,
) -> specs.AppDef:
    """`module` under torchrun on `nodes` x `ranks` processes; `resources` are arguments of `dist.ddp`.

    config, run, data: those that the entry takes, before its overrides.
    """
    places = [place for place in (config, run, data) if place]
    # A $ in an argument is the user's (OmegaConf's ${...}); doubled, TorchX's macro substitution leaves it alone.
    arguments = [argument.replace("$", "$$") for argument in (*places, *overrides)]
    resources["cpu"] = CORES * ranks if cpu is None else cpu
    resources["memMB"] = MEMORY_MB * ranks if memMB is None else memMB
    return dist.ddp(*arguments, m=module, j=f"{nodes}x{ranks}", env=ENV | (env or {}), **resources)
