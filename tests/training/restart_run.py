"""A process that is lost at the first attempt; at the next, one of them starts late: for torchrun --max-restarts."""

import atexit
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cmfast.compat.openai import dist_util
from cmfast.ranks import ranks

HELD: list[DistributedDataParallel] = []  # to the end of Python, as a script has it that trains at its top level


def threads() -> int:
    """Of this process."""
    return len(os.listdir("/proc/self/task"))


def gone(before: int) -> None:
    """End with status 1 where there are more threads than before, and not only because they are just ending."""
    end = time.monotonic() + 10
    while threads() > before:
        if time.monotonic() > end:
            os._exit(1)
        time.sleep(0.01)


def main() -> None:
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if again and os.environ["RANK"] == sys.argv[1]:
        time.sleep(2)  # so that the other one looks for it before
    lost = not again and os.environ["RANK"] == "1"
    if sys.argv[2] == "original":
        before = threads()
        atexit.register(gone, before)  # after what setup_dist leaves for the end
        dist_util.setup_dist()
        if lost:
            os.kill(os.getpid(), signal.SIGKILL)
        wrapped = DistributedDataParallel(torch.nn.Linear(1, 1))
        HELD.append(wrapped)
        wrapped(torch.ones(1)).sum().backward()
        number = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(number)
        assert number.item() == 1.0
        return
    with ranks() as group:
        if lost:
            os.kill(os.getpid(), signal.SIGKILL)
        assert group.mean(torch.tensor([float(group.rank)])).item() == 0.5


if __name__ == "__main__":
    main()
