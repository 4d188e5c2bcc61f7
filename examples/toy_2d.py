"""Points in the plane, where the consistency function is known: what training comes to, beside what it should.

    python examples/toy_2d.py --out DIR [--steps 2000]

Data are from one Gaussian, whose consistency function has a closed form (`cmfast.exact.gaussian_map`), or from a ring
of them, whose denoiser has one and whose consistency function is its ODE in 256 Heun steps. A small perceptron learns
each by distillation from that denoiser (CD), and from data alone (CT, ECT). Prints the root mean square error of the
learned maps by noise level, and draws the one-step samples in toy_2d.png. About three minutes on one core.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from perceptron import Perceptron
from torch import Tensor

from cmfast import Denoiser, Preconditioner
from cmfast.data import Batch
from cmfast.exact import MixtureDenoiser, gaussian_map, solved_map
from cmfast.objectives import ConsistencyDistillation, ConsistencyTraining, EasyConsistencyTuning, Objective
from cmfast.training import TrainOptions
from cmfast.training.step import TrainStep

SIGMA_MIN = 0.002
LEVELS = (0.1, 0.3, 1.0, 5.0, 80.0)
SHAPE = (2, 1, 1)
#: (x, sigma, boundary) -> where the trajectory of x ends.
Map = Callable[[Tensor, float, float], Tensor]


def gaussian() -> tuple[MixtureDenoiser, Map]:
    """One Gaussian: its denoiser and its consistency function."""
    mean, std = torch.tensor([0.3, -0.2]).view(1, *SHAPE), 0.5
    return MixtureDenoiser(mean, std), functools.partial(gaussian_map, mean=mean, std=std)


def ring(components: int = 6) -> tuple[MixtureDenoiser, Map]:
    """Gaussians on a circle."""
    angles = torch.arange(components) * (2 * torch.pi / components)
    data = MixtureDenoiser(0.7 * torch.stack([angles.cos(), angles.sin()], 1).view(components, *SHAPE), 0.1)
    return data, lambda x, sigma, boundary: solved_map(data, x.double(), sigma, boundary).float()


def objectives(steps: int) -> dict[str, Objective]:
    """What is compared, with the curriculum of a run of so many steps: targets follow faster than in the papers."""
    return {
        "CD": ConsistencyDistillation(loss_norm="l2", start_ema=0.5, start_scales=40),
        "CT": ConsistencyTraining(loss_norm="l2", start_ema=0.5, end_scales=40, total_steps=steps),
        "ECT": EasyConsistencyTuning(steps_per_stage=max(steps // 8, 1)),
    }


def train(objective: Objective, data: MixtureDenoiser, steps: int, seed: int = 0) -> Denoiser:
    """The average of a perceptron that was trained on fresh points at every step."""
    torch.manual_seed(seed)
    preconditioner = Preconditioner.by_name(objective.preconditioning)
    model = Denoiser(Perceptron(SHAPE, 96, 3), preconditioner, image_shape=SHAPE)
    options = TrainOptions(
        steps=steps, batch_size=256, learning_rate=2e-3, optimizer="adam", decay="cosine", averages=("warmup:0.99",)
    )
    step = TrainStep(model, objective, options, teacher_model=data if objective.needs_teacher else None)
    index = torch.arange(options.batch_size)
    for number in range(steps):
        step(Batch(data.sample(len(index)), None, index + number * len(index)), number)
    step.averages.copy_to(model, len(step.averages.schedules) - 1)
    return model.eval()


@torch.no_grad()
def errors(model: Denoiser, data: MixtureDenoiser, exact: Map, num: int = 2000) -> list[float]:
    """Root mean square distance of D(x, sigma) from the exact map, for noised data at each of the levels."""
    found = []
    for sigma in LEVELS:
        generator = torch.Generator().manual_seed(1)
        x = data.sample(num, generator)
        x = x + sigma * torch.randn(x.shape, generator=generator)
        difference = model(x, sigma) - exact(x, sigma, model.preconditioner.boundary)
        found.append(difference.square().sum((1, 2, 3)).mean().sqrt().item())
    return found


def table(rows: dict[tuple[str, str], list[float]]) -> str:
    """Markdown."""
    levels = " | ".join(f"σ = {level:g}" for level in LEVELS)
    lines = [f"| data | model | {levels} |", "| --- " * (len(LEVELS) + 2) + "|"]
    lines += [f"| {' | '.join(name)} | {' | '.join(f'{e:.3f}' for e in row)} |" for name, row in rows.items()]
    return "\n".join(lines)


@torch.no_grad()
def draw(
    axes: list, name: str, data: MixtureDenoiser, exact: Map, models: dict[str, Denoiser], num: int = 600
) -> None:
    """Data with trajectories of the ODE, then samples of each model, with a line from each to where it should be."""
    generator = torch.Generator().manual_seed(2)
    points = data.sample(num, generator).flatten(1)
    noise = 80 * torch.randn(num, *SHAPE, generator=generator)
    axes[0].scatter(*points.T, s=3, color="0.6")
    levels = [80 * (SIGMA_MIN / 80) ** (k / 40) for k in range(41)]
    for x in noise[:24].double():
        path = [x[None]]
        for sigma, lower in zip(levels, levels[1:]):
            path.append(solved_map(data, path[-1], sigma, lower, steps=8))
        axes[0].plot(*torch.cat(path).flatten(1).T, linewidth=0.7, color="tab:blue")
    axes[0].set_title(f"{name}: data, and trajectories", fontsize=9)
    for ax, (kind, model) in zip(axes[1:], models.items()):
        made, wanted = model(noise, 80.0).flatten(1), exact(noise, 80.0, model.preconditioner.boundary).flatten(1)
        ends = torch.stack([made, wanted], 1)
        ax.plot(*ends.permute(2, 1, 0), linewidth=0.5, color="tab:red", zorder=1)
        ax.scatter(*made.T, s=3, color="tab:blue", zorder=2)
        ax.set_title(f"{kind}: one step, and how far it is off", fontsize=9)
    for ax in axes:
        ax.set(xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), xticks=[], yticks=[], aspect="equal")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the picture")
    parser.add_argument("--steps", type=int, default=2000, help="of each training (default 2000)")
    options = parser.parse_args(arguments)
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(11, 5.8))
    rows = {}
    for line, (name, make) in zip(axes, {"Gaussian": gaussian, "ring": ring}.items()):
        data, exact = make()
        rows[name, "the denoiser itself"] = errors(data, data, exact)
        models = {}
        for kind, objective in objectives(options.steps).items():
            models[kind] = train(objective, data, options.steps)
            rows[name, kind] = errors(models[kind], data, exact)
        draw(line, name, data, exact, models)
    print(table(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(options.out / "toy_2d.png", dpi=60)


if __name__ == "__main__":
    main()
