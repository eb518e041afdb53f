"""A stand-in for an entry: writes down what reached each process, and fails on the rank it is told to fail on.

Also a TorchX component of it, which takes the same road as those in launch/.
"""

import json
import os
import sys
import time
from pathlib import Path

from torchx import specs

from launch import components


def component(*overrides: str, config: str, ranks: int = 2) -> specs.AppDef:
    """The probe under the launcher that train and evaluate use.

    Args:
        overrides: `fail=RANK`, or anything
        config: folder to write to
        ranks: processes
    """
    return components._ddp("tests.launch.probe", overrides, ranks, nodes=1, env=None, config=config, memMB=512)


def main() -> None:
    """Writes the arguments of this rank; the failing rank raises while the others would go on for a minute."""
    rank = os.environ["RANK"]
    seen = {"argv": sys.argv[1:], "threads": os.environ["OMP_NUM_THREADS"], "world": os.environ["WORLD_SIZE"]}
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(seen))
    if f"fail={rank}" in sys.argv:
        raise ValueError(f"rank {rank} found a bad row")
    if any(argument.startswith("fail=") for argument in sys.argv):
        time.sleep(60)


if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    record(main)()
