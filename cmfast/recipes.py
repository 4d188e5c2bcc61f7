"""Trainings that anyone can repeat: `python -m cmfast train --recipe mnist`."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cmfast import checkpoint, data, losses, schedules
from cmfast.denoiser import Denoiser, DenoiserFn
from cmfast.precondition import Preconditioner
from cmfast.training import LossFn, Trainer, TrainOptions
from cmfast.unet import UNetModel

#: EDM pre-training, a second part of it at higher noise levels, then consistency distillation from the result.
MNIST_EDM = TrainOptions(steps=1000, batch_size=64, learning_rate=1e-3, ema_rate=0.995)
MNIST_SHAPE = TrainOptions(steps=600, batch_size=64, learning_rate=1e-3, ema_rate=0.995, seed=1)
MNIST_CD = TrainOptions(steps=550, batch_size=32, learning_rate=4e-4, ema_rate=0.99, seed=2)
MNIST_GUIDED = TrainOptions(steps=280, batch_size=32, learning_rate=3e-4, warmup=20, ema_rate=0.99, seed=3)
#: How far the teacher of the last stage is pushed away from the other classes.
MNIST_GUIDANCE = 0.4
#: Levels of the grid that the distillation steps along, in its first half and in its second: few first, because
#: what the student learns at low noise has fewer levels to climb.
MNIST_SCALES = (9, 17)


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


def edm_loss(mean: float = -1.2, std: float = 1.2) -> LossFn:
    """EDM's loss at noise levels with ln sigma ~ N(mean, std^2).

    The defaults are EDM's, found on photographs; they draw few levels above 1, where the overall shape of an image
    is made.
    """

    def loss(model: Denoiser, images: Tensor, labels: Tensor, step: int) -> Tensor:
        sigma = schedules.lognormal_sigmas(torch.randn(len(images), device=images.device), mean=mean, std=std)
        return losses.denoising_loss(model, images, sigma, labels=labels)["loss"]

    return loss


def guided(teacher: Denoiser, weight: float) -> DenoiserFn:
    """D(x, y) + weight (D(x, y) - D(x, z)) with another class z drawn for each sample.

    Guidance of diffusion models (Ho & Salimans 2022) pushes away from the unconditional D; this teacher knows none,
    but a class that is not y has the same mean over draws up to the share of y.
    """

    def denoise(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        classes = teacher.num_classes or 1
        others = (labels + torch.randint(1, classes, labels.shape, device=labels.device)) % classes
        right, wrong = teacher(x.repeat(2, 1, 1, 1), sigma.repeat(2), torch.cat([labels, others])).chunk(2)
        return right + weight * (right - wrong)

    return denoise


def distillation_loss(teacher: Denoiser | DenoiserFn, steps: int, scales: tuple[int, int] = MNIST_SCALES) -> LossFn:
    """Consistency distillation with Heun steps and the pseudo-Huber distance; the student is its own target."""

    def loss(model: Denoiser, images: Tensor, labels: Tensor, step: int) -> Tensor:
        num_scales = scales[2 * step >= steps]
        terms = losses.consistency_loss(
            model, model, images, num_scales, teacher_model=teacher, labels=labels, loss_norm="huber"
        )
        return terms["loss"]

    return loss


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
    """All stages, resumed where `out` holds a checkpoint. Writes and returns `teacher.safetensors` and
    `model.safetensors` (float16), and `loss.png`."""
    out = Path(out)
    training, _ = data.mnist()
    torch.manual_seed(seed)
    model = mnist_model().to(device)
    curves: dict[str, list[float]] = {}

    def stage(title: str, model: Denoiser, loss_fn: LossFn, options: TrainOptions, steps: int, file: str) -> Denoiser:
        options = replace(options, steps=steps, seed=seed + options.seed)
        trainer = Trainer(model, loss_fn, training, options, out / file)
        average = trainer.run(progress=progress)
        curves[title] = trainer.losses
        return average

    model = stage("EDM pre-training", model, edm_loss(), MNIST_EDM, edm_steps, "edm.pt")
    model = copy.deepcopy(model).requires_grad_(True)
    teacher = stage("at higher noise levels", model, edm_loss(mean=0.0), MNIST_SHAPE, shape_steps, "shape.pt")
    loss_fn = distillation_loss(teacher, cd_steps)
    student = stage("distillation", as_consistency_model(teacher), loss_fn, MNIST_CD, cd_steps, "cd.pt")
    student = copy.deepcopy(student).requires_grad_(True)
    loss_fn = distillation_loss(guided(teacher, MNIST_GUIDANCE), guided_steps, (MNIST_SCALES[1],) * 2)
    student = stage("guided distillation", student, loss_fn, MNIST_GUIDED, guided_steps, "guided.pt")

    paths = [out / "teacher.safetensors", out / "model.safetensors", out / "loss.png"]
    for each, path in zip((teacher, student), paths):
        checkpoint.save(each, path, dtype=torch.float16)
    plot_losses(curves, paths[2])
    return paths


def plot_losses(curves: dict[str, list[float]], path: Path) -> None:
    """The loss of each step, and its running mean, one panel a curve."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(curves), figsize=(5 * len(curves), 3.5), squeeze=False)
    for panel, (title, losses_) in zip(panels[0], curves.items()):
        window = max(1, len(losses_) // 50)
        values = torch.tensor(losses_)
        panel.plot(values, linewidth=0.5, alpha=0.4)
        if len(values):
            means = values.unfold(0, window, 1).mean(1)
            panel.plot(torch.arange(len(means)) + window - 1, means)
        panel.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
