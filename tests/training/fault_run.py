"""A run by the command line in which something happens to one process at a step: what, rank, step, arguments."""

import os
import signal
import sys

import torch

from cmfast import cli
from cmfast.training import TrainStep
from cmfast.training.stop import Stop


def main(what: str, rank: str, at: str, *arguments: str) -> int:
    torch.set_num_threads(1)
    step, leave = TrainStep.__call__, Stop.__exit__

    def faulty(self, batch, number):
        if number == int(at) and os.environ.get("RANK", "0") == rank:
            if what == "die":
                os._exit(7)
            if what == "fail":
                raise ValueError("out of luck")
            if what == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            if what == "stop all":  # as a scheduler does: every process of the job, the workers that decode as well
                os.killpg(0, signal.SIGTERM)
        step(self, batch, number)

    def told(self, kind, error, trace):
        """As torchrun does that sees a process gone before this one: within the time between two of its steps."""
        Stop.__exit__ = leave
        leave(self, kind, error, trace)
        if error is not None:
            os.kill(os.getpid(), signal.SIGTERM)

    TrainStep.__call__ = faulty
    if what in ("die", "fail"):
        Stop.__exit__ = told
    return cli.main(["train", "--device", "cpu", *arguments])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
