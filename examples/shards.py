"""Images in many files, which as many processes make as there are: for more of them than one process can hold.

    torchrun --nproc-per-node 8 examples/shards.py --out DIR --files 200 [--images 50000] [--model FILE] [--steps 1]

Each file has a seed of its own, its number: its images follow from that, whoever makes them. A file appears when it is
whole, and one that is there is not made again, so that the same command goes on where a run ended. Processes do not
wait for each other: they may as well be jobs of a cluster that set RANK and WORLD_SIZE, and LOCAL_RANK
where processes of one machine see the same GPUs.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

import cmfast
from cmfast import images


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for NNNNNN.npz")
    parser.add_argument("--files", type=int, required=True)
    parser.add_argument("--images", type=int, default=50_000, help="in each file (default 50000)")
    parser.add_argument("--model", help="a checkpoint; default: the bundled one")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=256)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    sampler = cmfast.Sampler(cmfast.load(options.model, device=device), options.batch_size, steps=options.steps)
    for number in range(rank, options.files, size):
        path = options.out / f"{number:06d}.npz"
        if not path.exists():
            labels = sampler.labels(options.images, seed=number)
            images.save(path, sampler.sample(options.images, seed=number), labels)


if __name__ == "__main__":
    main()
