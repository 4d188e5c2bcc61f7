"""Digits from the bundled model, in one network call and in two, as pictures.

    python examples/sample.py --out DIR [--num 64] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import cmfast
from cmfast import images


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--num", type=int, default=64, help="images in each (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)

    model = cmfast.load(device="cuda" if torch.cuda.is_available() else "cpu")  # or a path: a .pt, a .safetensors, ...
    classes = [i % 10 for i in range(options.num)]
    for steps in (1, 2):
        # One batch size for all: the last batch is filled up, and the surplus dropped.
        sampler = cmfast.Sampler(model, batch_size=32, steps=steps)
        pixels = sampler.sample(options.num, seed=options.seed, classes=classes)  # uint8 [num, 32, 32, 1]
        path = images.save(options.out / f"digits_{steps}step.png", pixels)
        levels = ", ".join(f"{sigma:.4g}" for sigma in sampler.sigmas)
        print(f"{path}: {list(pixels.shape)}, the network at sigma = {levels}")
    for part, (how, why) in sampler.explain().items():
        print(f"{part}: {how} ({why})")


if __name__ == "__main__":
    main()
