"""The bundled model, in four stages that anyone can repeat: `python -m cmfast train --recipe mnist`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from cmfast import checkpoint, data, losses, ops
from cmfast.denoiser import Denoiser, Model
from cmfast.noise import OTHERS_DRAW
from cmfast.objectives import EDM, Objective, Stage
from cmfast.precondition import Preconditioner
from cmfast.ranks import Ranks
from cmfast.training import Stopped, Trainer, TrainOptions
from cmfast.training.pictures import plot_losses
from cmfast.training.stop import Stop
from cmfast.unet import UNetModel

_COMMON = TrainOptions(
    steps=1,
    batch_size=64,
    learning_rate=1e-3,
    optimizer="adam",
    warmup=100,
    decay="cosine",
    max_norm=1.0,
    log_interval=1,
    save_interval=100,
    keep=1,
)
#: EDM pre-training, a second part of it at higher noise levels, then consistency distillation from the result.
MNIST_EDM = replace(_COMMON, steps=1000, averages=("warmup:0.995",))
MNIST_SHAPE = replace(MNIST_EDM, steps=600, seed=1)
MNIST_CD = replace(_COMMON, steps=1500, batch_size=32, learning_rate=4e-4, averages=("warmup:0.99",), seed=2)
MNIST_GUIDED = replace(MNIST_CD, steps=250, learning_rate=3e-4, warmup=20, seed=3)
#: How far the teacher of the last stage is pushed away from the other classes.
MNIST_GUIDANCE = 0.4
#: Levels of the grid that the distillation steps along, in its first half and in its second: few first, because
#: what the student learns at low noise has fewer levels to climb.
MNIST_SCALES = (9, 17)


@dataclass(frozen=True)
class DigitDistillation(Objective):
    """Consistency distillation with Heun steps and the pseudo-Huber distance; the student is its own target.

    scales: levels of the grid in the first half of `steps` and in the second. guidance: see `guided`.
    """

    needs_teacher: ClassVar[bool] = True

    steps: int = MNIST_CD.steps
    scales: tuple[int, int] = MNIST_SCALES
    guidance: float = 0.0

    def stage(self, step: int) -> Stage:
        """One stage; the number of levels changes once."""
        return Stage(num_scales=self.scales[2 * step >= self.steps])

    def _loss(
        self, model: Model, x_start: Tensor, stage: Stage, draw: ops.Draw, labels: Tensor | None,
        *, teacher_model: Any = None, **others: Any,
    ) -> dict[str, Tensor]:  # fmt: skip
        if self.guidance:
            teacher_model = guided(teacher_model, self.guidance, draw)
        options = {"teacher_model": teacher_model, "loss_norm": "huber"}
        return losses.consistency_loss(model, model, x_start, stage.levels, draw=draw, labels=labels, **options)


def guided(teacher: Denoiser, weight: float, draw: ops.Draw) -> Callable[..., Tensor]:
    """D(x, y) + weight (D(x, y) - D(x, z)) with another class z drawn for each sample.

    Guidance of diffusion models (Ho & Salimans 2022) pushes away from the unconditional D; this teacher knows none,
    but a class that is not y has the same mean over draws up to the share of y.
    """
    classes = teacher.num_classes or 2
    steps = 1 + ops.uniform_int(draw.seed, draw.index, classes - 1, draw=OTHERS_DRAW)

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        others = (labels + steps) % classes
        both: Tensor = teacher(x.repeat(2, 1, 1, 1), sigma.repeat(2), torch.cat([labels, others]))
        right, wrong = both.chunk(2)
        return right + weight * (right - wrong)

    return denoise


def mnist_model() -> Denoiser:
    """The class-conditional U-Net of the bundled model: [B, 1, 32, 32], 10 classes, 1.2 M parameters."""
    network = UNetModel(
        image_size=32,
        in_channels=1,
        model_channels=32,
        out_channels=1,
        num_res_blocks=1,
        attention_resolutions=(4,),
        channel_mult=(1, 2, 2),
        num_classes=10,
        num_head_channels=32,
        use_scale_shift_norm=True,
    ).to(memory_format=torch.channels_last)
    return Denoiser(network, Preconditioner.edm(), image_shape=(1, 32, 32), num_classes=10)


def as_consistency_model(teacher: Denoiser) -> Denoiser:
    """A copy of a diffusion model with the boundary condition of a consistency model: where a student starts."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.preconditioner = Preconditioner.consistency(teacher.preconditioner.sigma_data, teacher.sigma_min)
    return student


def train_mnist(
    out: Path | str,
    *,
    edm_steps: int = MNIST_EDM.steps,
    shape_steps: int = MNIST_SHAPE.steps,
    cd_steps: int = MNIST_CD.steps,
    guided_steps: int = MNIST_GUIDED.steps,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[Path]:
    """All stages, each gone on with where `out` holds a part of it. Writes and returns `teacher.safetensors` and
    `model.safetensors` (float16), and `loss.png`.

    Raises: Stopped: by SIGTERM, after the step at hand; the same call goes on. ValueError: a stage without steps.
    """
    steps = {"edm": edm_steps, "shape": shape_steps, "cd": cd_steps, "guided": guided_steps}
    for name, value in steps.items():
        if value < 1:
            raise ValueError(f"{name}_steps must be 1 or more, got {value}")
    with Stop(Ranks()) as stop:
        return _train_stages(Path(out), steps, seed, device, progress, stop)


def _train_stages(
    out: Path, steps: dict[str, int], seed: int, device: torch.device | str, progress: bool, stop: Stop
) -> list[Path]:
    training, _ = data.mnist()
    torch.manual_seed(seed)
    model = mnist_model().to(device)
    curves: dict[str, tuple[list[int], list[float]]] = {}

    def stage(
        title: str, model: Denoiser, objective: Objective, options: TrainOptions, folder: str, teacher: Denoiser | None
    ) -> Denoiser:
        if stop.now():  # at the last step of the stage before, which ended it
            raise Stopped(f"stopped before the stage {folder!r}; those before it are in {out}")
        options = replace(options, steps=steps[folder], seed=seed + options.seed)
        trainer = Trainer(
            model.to(device), objective, training, options, out / folder, teacher_model=teacher, resume="auto"
        )
        average = trainer.run(progress=progress)
        curves[title] = trainer.losses()
        return copy.deepcopy(average).to(device)

    model = stage("EDM pre-training", model, EDM(), MNIST_EDM, "edm", None)
    teacher = stage("at higher noise levels", model, EDM(mean=0.0), MNIST_SHAPE, "shape", None)
    objective = DigitDistillation(steps["cd"])
    student = stage("distillation", as_consistency_model(teacher), objective, MNIST_CD, "cd", teacher)
    objective = DigitDistillation(steps["guided"], (MNIST_SCALES[1], MNIST_SCALES[1]), MNIST_GUIDANCE)
    student = stage("guided distillation", student, objective, MNIST_GUIDED, "guided", teacher)

    paths = [out / "teacher.safetensors", out / "model.safetensors", out / "loss.png"]
    for each, path in zip((teacher, student), paths):
        checkpoint.save(each, path, dtype=torch.float16)
    plot_losses(curves, paths[2])
    return paths
