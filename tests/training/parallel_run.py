"""A run in the processes that torchrun starts: objective, kind, folder, steps."""

import sys
from dataclasses import replace

import torch

from cmfast.ranks import ranks
from tests.training.toys import PAIRED, trainer


def main(name: str, kind: str, folder: str, steps: str, *more: str) -> None:
    torch.set_num_threads(1)
    with ranks() as group:
        options = replace(PAIRED, steps=int(steps), parallel=kind, microbatch=2)
        trainer(name, folder, options, group=group, resume="resume" in more).run(progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
