"""A process that is lost at the first attempt; at the next, one of them starts late: for torchrun --max-restarts."""

import atexit
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from cmfast.compat.openai import dist_util
from cmfast.ranks import ranks


def threads() -> int:
    """Of this process, when those that have ended are gone from the list."""
    time.sleep(0.2)
    return len(os.listdir("/proc/self/task"))


def main() -> None:
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if again and os.environ["RANK"] == sys.argv[1]:
        time.sleep(2)  # so that the other one looks for it before
    lost = not again and os.environ["RANK"] == "1"
    if sys.argv[2] == "original":
        before = threads()
        atexit.register(lambda: threads() == before or os._exit(1))  # after what setup_dist leaves for the end
        dist_util.setup_dist()
        if lost:
            os.kill(os.getpid(), signal.SIGKILL)
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
