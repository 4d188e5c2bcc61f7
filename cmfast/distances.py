"""Weighted distances between what a student and its target denoise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cmfast import ops
from cmfast.denoiser import Evaluator
from cmfast.ops import WEIGHTINGS, _check
from cmfast.ops.losses import NORMS, _check_weight

#: Distances between two denoised batches, by name.
LOSS_NORMS = ("l1", "l2", "l2-32", "huber", "lpips")
#: (x, y) -> distance per sample [B], such as `cmfast.perceptual.LPIPS()`; [B, 1, 1, 1], as of the `lpips` package, too.
Perceptual = Callable[[Tensor, Tensor], Tensor]
#: The name of a weighting (`ops.WEIGHTINGS`), or sigma [B] -> weight [B].
Weighting = str | Callable[[Tensor], Tensor]


def distance(
    x: Tensor,
    target: Tensor,
    weight: Tensor,
    *,
    loss_norm: str = "l2",
    lpips: Perceptual | None = None,
    huber_c: float | None = None,
) -> Tensor:
    """Per sample [B]: weight times the distance of x and target [B, C, H, W].

    `l1`, `l2`: means over the sample. `l2-32`: l2 of both resized to 32 x 32, bilinear. `huber`: pseudo-Huber of the
    sample vector, c = 0.00054 sqrt(D) unless `huber_c` is given (Song & Dhariwal 2023). `lpips`: that of the `lpips`
    module given. loss_norm is one of these; weight scalar or [B].

    Raises: ValueError: unknown norm (the message lists the known ones), `lpips` without a module or with one that does
        not return B distances, `l2-32` of other data than images, or a weight of another shape.
    """
    _check.choice("loss_norm", loss_norm, LOSS_NORMS)
    if loss_norm == "lpips":
        if lpips is None:
            raise ValueError("loss_norm='lpips' needs lpips=, for example lpips=cmfast.perceptual.LPIPS()")
        _check_weight(weight, x)
        distances = lpips(x, target)
        # [B, 1, 1, 1] times a weight [B] would be [B, 1, 1, B], whose mean is another loss.
        if distances.numel() != len(x):
            raise ValueError(f"lpips must return B = {len(x)} distances, got {list(distances.shape)}")
        return distances.reshape(len(x)) * weight
    if loss_norm == "l2-32":
        if x.ndim != 4:
            raise ValueError(f"loss_norm='l2-32' is for images [B, C, H, W], got {list(x.shape)}: take l1, l2 or huber")
        x, target = (F.interpolate(image, size=32, mode="bilinear") for image in (x, target))
    if loss_norm == "huber":
        return ops.weighted_loss(x, target, weight, norm="huber", huber_c=huber_constant(x, huber_c))
    return ops.weighted_loss(x, target, weight, norm="l1" if loss_norm == "l1" else "l2")


def huber_constant(x: Tensor, huber_c: float | None) -> float:
    """huber_c, or where it is None 0.00054 sqrt(D), for samples x [B, ...] of D elements: Song & Dhariwal 2023."""
    return 0.00054 * (x[0].numel() if len(x) else 1) ** 0.5 if huber_c is None else huber_c


@dataclass(frozen=True)
class Measure:
    """How far apart two denoised batches are: `distance` with weights of the noise level, or weights that are given.

    loss_norm, lpips, huber_c: as of `distance`. weighting: a name of `ops.WEIGHTINGS`, with sigma_data; a function of
    sigma; or weights [B].

    Raises: ValueError: an unknown loss_norm or weighting, or sigma_data that is not positive.
    """

    loss_norm: str = "l2"
    lpips: Perceptual | None = None
    huber_c: float | None = None
    weighting: Weighting | Tensor = "uniform"
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        _check.choice("loss_norm", self.loss_norm, LOSS_NORMS)
        if isinstance(self.weighting, str):
            _check.choice("weighting", self.weighting, WEIGHTINGS)
        _check.positive("sigma_data", self.sigma_data)

    def weight(self, sigma: Tensor, x: Tensor) -> Tensor:
        """Of each sample of x, [B] or scalar."""
        if isinstance(self.weighting, str):
            return ops.loss_weight(sigma, self.weighting, sigma_data=self.sigma_data)
        weight = self.weighting(sigma) if callable(self.weighting) else self.weighting
        _check_weight(weight, x)
        return weight

    def between(
        self,
        student: Evaluator,
        point: tuple[Tensor, Tensor, Tensor],
        target: Tensor | tuple[Evaluator, tuple[Tensor, Tensor, Tensor]],
    ) -> Tensor:
        """The weighted distance [B] of the student's D from a target, or from another model's D.

        A point is (model_output, x_t, sigma). Where the norm and the scalings allow, no D is stored.
        """
        model_output, x_t, sigma = point
        others = isinstance(target, tuple) and target[0].scaling != student.scaling
        if self.loss_norm not in NORMS or others:
            denoised = student.denoised(model_output, x_t, sigma)
            if isinstance(target, tuple):
                with torch.no_grad():
                    target = target[0].denoised(*target[1])
            options: dict[str, Any] = {"loss_norm": self.loss_norm, "lpips": self.lpips, "huber_c": self.huber_c}
            return distance(denoised, target, self.weight(sigma, x_t), **options)
        x_t2 = next_sigma = None
        if isinstance(target, tuple):
            target, x_t2, next_sigma = (x.detach() for x in target[1])
        return ops.consistency_loss(
            model_output,
            x_t,
            sigma,
            target,
            self.weighting if isinstance(self.weighting, str) else self.weight(sigma, x_t),
            x_t2,
            next_sigma,
            norm=self.loss_norm,
            huber_c=huber_constant(x_t, self.huber_c) if self.loss_norm == "huber" else 0.0,
            weight_sigma_data=self.sigma_data,
            **student.scaling,
        )
