"""Consistency distillation in a loop of one's own, of points in the plane whose consistency function is known.

    python examples/distil_toy.py [--steps 500]

The loop is all there is: a loss, an optimizer, averages, of which one is the target. `toy_2d.py` has the same student
trained by `TrainStep`, and draws it. Prints the error against the exact map by noise level; 10 seconds on one core.
"""

from __future__ import annotations

import argparse
import copy

import torch
from perceptron import Perceptron
from toy_2d import LEVELS, SHAPE, errors, gaussian

from cmfast import Denoiser, Preconditioner, losses, ops, optim
from cmfast.ema import Averages
from cmfast.exact import MixtureDenoiser


def distil(teacher: MixtureDenoiser, steps: int, batch: int = 256, seed: int = 0) -> tuple[Denoiser, Denoiser]:
    """The student before and after so many steps: the average of its weights."""
    torch.manual_seed(seed)
    student = Denoiser(Perceptron(SHAPE, 96, 3), Preconditioner.consistency(), image_shape=SHAPE)
    target, before = (copy.deepcopy(student).requires_grad_(False) for _ in range(2))
    # The target is average 0, which follows fast; average 1 is what is kept. The optimizer updates both.
    averages = Averages(student, [0.9, "warmup:0.99"], targets={0: target})
    optimizer = optim.RAdam(student.parameters(), lr=2e-3, betas=(0.9, 0.99), max_norm=1.0, averages=averages)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        x_start = teacher.sample(batch)
        # Levels and noise of a sample follow from the seed and its number in the run.
        draw = ops.Draw(seed, torch.arange(step * batch, (step + 1) * batch), 0)
        terms = losses.consistency_loss(student, target, x_start, num_scales=40, teacher_model=teacher, draw=draw)
        optimizer.zero_grad()
        terms["loss"].mean().backward()
        optimizer.step()
    return before, averages.module(1)  # type: ignore[return-value]


def main(arguments: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="of the training (default 500)")
    teacher, exact = gaussian()  # the best denoiser of these data, and where its trajectories end
    before, after = distil(teacher, parser.parse_args(arguments).steps)
    models = {"before": before, "after": after, "the denoiser itself": teacher}
    found = {name: errors(model, teacher, exact) for name, model in models.items()}
    print("sigma:", *(f"{level:8g}" for level in LEVELS))
    for name, row in found.items():
        print(*(f"{error:8.3f}" for error in row), name)
    return found


if __name__ == "__main__":
    main()
