"""Small runs for the tests of training."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from cmfast import Denoiser, Preconditioner, UNetModel
from cmfast.data import ImageData
from cmfast.objectives import (
    EDM,
    ConsistencyDistillation,
    ConsistencyTraining,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    ProgressiveDistillation,
)
from cmfast.training import Trainer, TrainOptions

DATA = ImageData(torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.5, torch.arange(40) % 7)
#: One of each, whose curricula change within 20 steps.
OBJECTIVES = {
    "edm": EDM(),
    "cd": ConsistencyDistillation(loss_norm="l2", start_scales=6),
    "ct": ConsistencyTraining(loss_norm="l2", total_steps=20),
    "pd": ProgressiveDistillation(loss_norm="l2", start_scales=4, steps_per_stage=3),
    "ict": ImprovedConsistencyTraining(total_steps=20),
    "ect": EasyConsistencyTuning(steps_per_stage=7),
}
#: Batches straddle epochs: 40 images are no multiple of 6.
OPTIONS = TrainOptions(
    steps=20, batch_size=6, learning_rate=3e-3, save_interval=10, log_interval=5, averages=("0.9", "power:0.1")
)
#: For runs that are compared: far enough that rounding is small beside it, and ended before RAdam's sixth step, the
#: first that divides by moments: those of a bias before a normalisation are rounding and nothing else.
PAIRED = replace(OPTIONS, steps=4, learning_rate=0.03, save_interval=2, log_interval=1)


def unet(seed: int = 0, dropout: float = 0.1, **options) -> UNetModel:
    torch.manual_seed(seed)
    network = UNetModel(
        8, 3, 32, 3, 1, attention_resolutions=(2,), channel_mult=(1, 2), num_classes=7, num_head_channels=16,
        dropout=dropout, use_scale_shift_norm=True, **options,
    )  # fmt: skip
    with torch.no_grad():  # a new U-Net ends in zeros: its output would show nothing
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    return network


def denoiser(objective, network=None) -> Denoiser:
    preconditioner = Preconditioner.by_name(objective.preconditioning)
    return Denoiser(network or unet(), preconditioner, image_shape=(3, 8, 8))


def teacher(objective, seed: int = 1):
    if not objective.needs_teacher:
        return None
    return Denoiser(unet(seed, dropout=0.0), Preconditioner.edm(), image_shape=(3, 8, 8))


def trainer(name, out, options=OPTIONS, network=None, data=DATA, **more) -> Trainer:
    objective = OBJECTIVES[name] if isinstance(name, str) else name
    more = {"teacher_model": teacher(objective), **more}
    return Trainer(denoiser(objective, network), objective, data, options, out, **more)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Exploding(nn.Module):
    """A network whose output is NaN at one step of a run, as long as `at` says so."""

    at: int | None = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.calls = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), 0

    def forward(self, x, t):
        self.calls += 1
        return self.norm(self.conv(x) * (float("nan") if self.calls - 1 == self.at else 1.0))


def exploding(out, at, options=OPTIONS, **more):
    network = Exploding()
    network.at = at
    model = Denoiser(network, Preconditioner.edm(), image_shape=(3, 8, 8))
    return Trainer(model, EDM(), ImageData(DATA.images), options, out, **more)
