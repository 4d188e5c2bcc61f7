"""A process that is lost at the first attempt; at the next, one of them starts late: for torchrun --max-restarts."""

import os
import signal
import sys
import time

import torch

from cmfast.ranks import ranks


def main() -> None:
    again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
    if again and os.environ["RANK"] == sys.argv[1]:
        time.sleep(2)  # so that the other one looks for it before
    with ranks() as group:
        if not again and group.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        assert group.mean(torch.tensor([float(group.rank)])).item() == 0.5


if __name__ == "__main__":
    main()
