"""What consistency distillation is said to prefer, tried on small digits: Heun or Euler, few levels or many, the norm.

    python examples/findings.py --out DIR [--steps 300] [--seeds 2]

Song et al. 2023, section 6.1, compare on CIFAR-10, with hundreds of thousands of steps. Here a diffusion model of
16 x 16 digits is trained in a few minutes, and students of it are distilled with equal budgets. A student's one-step
sample and the teacher's ODE solution from the same noise should be one image. The distance of such pairs is what is
compared: it tells students apart with far fewer samples than a distance of distributions.

Writes findings.md and findings.png. 9 minutes of one core of an AMD EPYC.
"""

from __future__ import annotations

import argparse
import copy
import functools
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from perceptron import Perceptron
from torch import Tensor

import cmfast
from cmfast import Denoiser, Preconditioner, data, quality
from cmfast.digits import as_consistency_model
from cmfast.exact import solved_map
from cmfast.objectives import EDM, ConsistencyDistillation
from cmfast.perceptual import LPIPS
from cmfast.training import TrainOptions
from cmfast.training.step import TrainStep

SIZE, SIGMA_MIN, SIGMA_MAX = 16, 0.002, 80.0
#: Steps of the teacher's ODE solution, and images that a comparison takes.
SOLUTION_STEPS, IMAGES = 40, 500
OPTIONS = TrainOptions(
    steps=1,
    batch_size=64,
    learning_rate=1e-3,
    optimizer="adam",
    warmup=20,
    decay="cosine",
    max_norm=1.0,
    averages=("warmup:0.99",),
)


class Arm(NamedTuple):
    """One way to distil."""

    solver: str
    num_scales: int
    loss_norm: str


class Result(NamedTuple):
    """What became of it. errors: after each of `marks_of` steps; seconds: of the processor, a step."""

    arm: Arm
    seed: int
    errors: list[float]
    accuracy: float
    frechet: float
    seconds: float


COMMON = Arm("heun", 20, "l2")
ARMS = [
    *(COMMON._replace(num_scales=n) for n in (5, 10, 20, 40)),
    *(COMMON._replace(solver="euler", num_scales=n) for n in (5, 10, 20)),
    *(COMMON._replace(loss_norm=norm) for norm in ("l1", "huber", "lpips")),
]


class Judge:
    """Measures students: against the teacher's solutions, and as images of digits."""

    def __init__(self, teacher: Denoiser, digits: data.ImageData, epochs: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.noise = SIGMA_MAX * torch.randn(IMAGES, 1, SIZE, SIZE, generator=generator)
        self.labels = torch.arange(IMAGES) % 10
        solve = functools.partial(solved_map, teacher, sigma=SIGMA_MAX, boundary=SIGMA_MIN, labels=self.labels)
        self.solution = solve(self.noise, steps=SOLUTION_STEPS)
        self.untrained = self.error(self.one_step(as_consistency_model(teacher)))
        large = data.ImageData(F.interpolate(digits.images, size=32, mode="bilinear"), digits.labels)
        self.classifier = quality.train_classifier(large, epochs=epochs)
        self.real = torch.cat([self.classifier.features(part) for part in large.images.split(500)])

    @torch.no_grad()
    def one_step(self, student: Denoiser) -> Tensor:
        """Samples, of the noise that `solution` starts from."""
        return student(self.noise, SIGMA_MAX, self.labels, clip=True)

    def error(self, samples: Tensor) -> float:
        """Root mean square difference from the teacher's solutions, black and white being 2 apart."""
        return (samples - self.solution).square().mean().sqrt().item()

    def quality(self, samples: Tensor) -> tuple[float, float]:
        """(class accuracy, Fréchet distance) in a classifier of digits."""
        features = self.classifier.features(F.interpolate(samples, size=32, mode="bilinear"))
        accuracy = (self.classifier.head(features).argmax(1) == self.labels).double().mean().item()
        return accuracy, quality.frechet_distance(features, self.real)


def train(step: TrainStep, digits: data.ImageData, marks: list[int]) -> Iterator[Denoiser]:
    """The average of a student after as many steps as the marks say; the next changes it."""
    average = copy.deepcopy(step.model).eval()
    batches = digits.batches(step.options.batch_size, seed=step.options.seed)
    for number in range(marks[-1]):
        step(next(batches), number)
        if number + 1 in marks:
            step.averages.copy_to(average, len(step.averages.schedules) - 1)
            yield average


def train_teacher(digits: data.ImageData, steps: int) -> Denoiser:
    """A diffusion model. Its noise levels are those of Karras et al. 2022 moved up a little: digits are few shapes."""
    torch.manual_seed(0)
    shape = (1, SIZE, SIZE)
    model = Denoiser(Perceptron(shape, 384, 4, num_classes=10), Preconditioner.edm(), image_shape=shape)
    (teacher,) = train(TrainStep(model, EDM(mean=-0.5, std=1.5), replace(OPTIONS, steps=steps)), digits, [steps])
    return teacher


def distil(arm: Arm, seed: int, teacher: Denoiser, digits: data.ImageData, judge: Judge, steps: int) -> Result:
    """Train one student, and measure it on the way."""
    torch.manual_seed(seed)
    lpips = functools.partial(LPIPS(pretrained=False), resize=False) if arm.loss_norm == "lpips" else None
    objective = ConsistencyDistillation(arm.loss_norm, solver=arm.solver, start_scales=arm.num_scales)
    options = replace(OPTIONS, steps=steps, seed=seed)
    step = TrainStep(as_consistency_model(teacher), objective, options, teacher_model=teacher, lpips=lpips)
    errors, seconds, start = [], 0.0, time.process_time()
    for student in train(step, digits, marks_of(steps)):
        seconds += time.process_time() - start
        samples = judge.one_step(student)
        errors.append(judge.error(samples))
        start = time.process_time()
    return Result(arm, seed, errors, *judge.quality(samples), seconds / steps)


def marks_of(steps: int) -> list[int]:
    """When a student is measured: a twelfth of the way, a sixth, a third, two thirds, the end."""
    return sorted({max(1, steps * k // 12) for k in (1, 2, 4, 8, 12)})


def table(results: list[Result], steps: int) -> list[str]:
    """Markdown: of each arm the means of all seeds, and how far seeds lie apart."""
    marks = " | ".join(f"{mark} steps" for mark in marks_of(steps))
    lines = [
        f"| solver | N | distance | error: {marks} | range of seeds | class accuracy | Fréchet | CPU s/step |",
        "| --- " * (len(marks_of(steps)) + 7) + "|",
    ]
    for arm in dict.fromkeys(result.arm for result in results):
        own = [result for result in results if result.arm == arm]
        errors = [statistics.mean(each) for each in zip(*(result.errors for result in own))]
        last = [result.errors[-1] for result in own]
        lines.append(
            f"| {arm.solver} | {arm.num_scales} | {arm.loss_norm} | {' | '.join(f'{e:.3f}' for e in errors)} | "
            f"{min(last):.3f}-{max(last):.3f} | {statistics.mean(r.accuracy for r in own):.1%} | "
            f"{statistics.mean(r.frechet for r in own):.1f} | {statistics.mean(r.seconds for r in own):.2f} |"
        )
    return lines


def picture(results: list[Result], steps: int, path: Path) -> None:
    """Errors on the way: by number of levels, by solver, by distance."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    panels = {
        "number of levels N": lambda arm: arm[::2] == COMMON[::2],
        "solver of the teacher": lambda arm: arm.loss_norm == COMMON.loss_norm and arm.num_scales in (5, 20),
        "distance": lambda arm: arm[:2] == COMMON[:2],
    }
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6), sharey=True)
    for ax, (title, chosen) in zip(axes, panels.items()):
        for arm in filter(chosen, dict.fromkeys(result.arm for result in results)):
            own = [result.errors for result in results if result.arm == arm]
            label = f"{arm.solver}, N = {arm.num_scales}, {arm.loss_norm}"
            (line,) = ax.plot(marks_of(steps), [statistics.mean(each) for each in zip(*own)], "o-", label=label)
            for errors in own:
                ax.plot(marks_of(steps), errors, ".", color=line.get_color(), alpha=0.5)
        ax.set(title=title, xlabel="steps")
        ax.legend(fontsize=8)
    axes[0].set_ylabel("error of one-step samples (RMS)")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write(out: Path, results: list[Result], judge: Judge, options: argparse.Namespace, seconds: float) -> None:
    """findings.md and findings.png of what is there so far."""
    accuracy, frechet = judge.quality(judge.solution)
    lines = [
        "# Findings of consistency distillation, on small digits",
        "",
        *table(results, options.steps),
        "",
        f"The teacher's solution itself: class accuracy {accuracy:.1%}, Fréchet distance {frechet:.1f}.",
        f"The teacher with the scalings of a student, before any step: error {judge.untrained:.3f}.",
        "",
        f"{cpu()}, {torch.get_num_threads()} thread(s); Python {platform.python_version()}, "
        f"PyTorch {torch.__version__}, cmfast {cmfast.__version__}; {options.seeds} seed(s); "
        f"{seconds / 60:.0f} minutes of CPU time;",
        f"`python examples/findings.py --out DIR --steps {options.steps} --teacher-steps {options.teacher_steps} "
        f"--seeds {options.seeds}`",
    ]
    (out / "findings.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    picture(results, options.steps, out / "findings.png")


def cpu() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--steps", type=int, default=300, help="of each student (default 300)")
    parser.add_argument("--teacher-steps", type=int, default=2000, help="default 2000")
    parser.add_argument("--seeds", type=int, default=2, help="students of each kind (default 2)")
    parser.add_argument("--epochs", type=int, default=4, help="of the classifier that judges (default 4)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    digits = data.open_data("mnist", image_size=SIZE)
    teacher = train_teacher(digits, options.teacher_steps)
    judge = Judge(teacher, digits, options.epochs)
    print(f"teacher: {time.process_time():.0f} s; a student before any step: {judge.untrained:.3f}", flush=True)
    results: list[Result] = []
    for seed in range(options.seeds):
        for arm in ARMS:
            results.append(distil(arm, seed, teacher, digits, judge, options.steps))
            print(results[-1], flush=True)
        write(options.out, results, judge, options, time.process_time())


if __name__ == "__main__":
    main()
