"""Runs in processes that torchrun starts, one after the other in a folder: each whole, and interrupted; or gone on."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from cmfast.ranks import ranks
from tests.training.toys import PAIRED, trainer

#: An objective, and how two processes share its run. RESUMED: objectives that are interrupted, too.
CASES = (("cd", "ddp"), ("pd", "ddp"), ("cd", "fsdp"))
RESUMED = ("cd",)


def main(folder: str, *more: str) -> None:
    torch.set_num_threads(1)
    resume = "resume" in more
    with ranks() as group:
        for name, kind in CASES:
            for run, steps in (("part", 4),) if resume else (("two", 4), ("part", 2)):
                if run == "two" or name in RESUMED:
                    options = replace(PAIRED, steps=steps, parallel=kind, microbatch=2)
                    out = Path(folder, f"{name}-{kind}", run)
                    trainer(name, out, options, group=group, resume=resume).run(progress=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
