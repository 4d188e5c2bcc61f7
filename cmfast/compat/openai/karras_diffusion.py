"""`cm.karras_diffusion`: the denoiser with its losses, the samplers, and zero-shot editing.

The same arguments give the same numbers under the same seeds on a CPU: noise is drawn in the original's order, also
where it is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmfast import losses, ops
from cmfast.compat.openai._editing import iterative_colorization, iterative_inpainting, iterative_superres
from cmfast.compat.openai._loops import (
    Callback,
    get_ancestral_step,
    get_sigmas_karras,
    sample_dpm,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_midpoint_ancestral,
    sample_onestep,
    sample_progdist,
    stochastic_iterative_sampler,
    to_d,
)
from cmfast.compat.openai.nn import append_dims, append_zero, mean_flat
from cmfast.compat.openai.random_util import get_generator
from cmfast.denoiser import Evaluator, denoise_with, stated
from cmfast.perceptual import LPIPS, unit_images
from cmfast.precondition import Preconditioner

__all__ = [
    "KarrasDenoiser",
    "append_dims",
    "append_zero",
    "get_ancestral_step",
    "get_sigmas_karras",
    "get_weightings",
    "iterative_colorization",
    "iterative_inpainting",
    "iterative_superres",
    "karras_sample",
    "mean_flat",
    "sample_dpm",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_midpoint_ancestral",
    "sample_onestep",
    "sample_progdist",
    "stochastic_iterative_sampler",
    "to_d",
]


def _like_its_input(function: Callable[[Tensor], Any], value: Any) -> Any:
    """A function of floating tensors, for integer ones, numbers and arrays too: these give numbers and arrays."""
    if isinstance(value, Tensor):
        return function(value if value.is_floating_point() else value.float())
    array = np.asarray(value)
    result = function(torch.as_tensor(array if array.dtype.kind == "f" else array.astype(float), device="cpu"))

    def back(part: Tensor) -> Any:
        return part.numpy() if array.ndim else part.item()

    return tuple(map(back, result)) if isinstance(result, tuple) else back(result)


def get_weightings(weight_schedule: str, snrs: Any, sigma_data: float) -> Any:
    """Loss weights from signal-to-noise ratios, a tensor, an array or a number: `ops.snr_weight`."""
    return _like_its_input(lambda snr: ops.snr_weight(snr, weight_schedule, sigma_data=sigma_data), snrs)


class _UnitLPIPS(LPIPS):
    """LPIPS of images in [0, 1] at their own size, on the device they are on."""

    def forward(self, x: Tensor, target: Tensor) -> Tensor:  # type: ignore[override]  # fewer arguments
        self.to(x.device)
        return super().forward(x, target, resize=False, value_range=(0.0, 1.0))


def _check_network(model: object) -> None:
    """Raises: TypeError: D(x, sigma) in the place of a network F(x, timesteps), which takes the same arguments."""
    if isinstance(stated(model, "preconditioner"), Preconditioner):
        raise TypeError(
            f"the model is a {type(model).__name__}, D(x, sigma) already, and would be scaled twice: give its network, "
            "as in karras_sample(diffusion, denoiser.network, ...)"
        )


class KarrasDenoiser:
    """The scalings around a network, and the losses.

    Args:
        sigma_data: standard deviation of the data.
        sigma_max, sigma_min, rho: noise levels; D is the identity at sigma_min with `distillation`.
        weight_schedule: `snr`, `snr+1`, `karras`, `truncated-snr`, `uniform`.
        distillation: scalings of a consistency model, else of EDM.
        loss_norm: `l1`, `l2`, `l2-32`, `lpips`.

    A subclass may override `denoise`, `get_scalings` or `get_scalings_for_boundary_condition`: samplers and losses
    then go through its `denoise`. A model is a network F(x, timesteps): of a `cmfast.Denoiser`, its `network`; where
    that itself is given, losses raise TypeError.
    """

    def __init__(
        self,
        sigma_data: float = 0.5,
        sigma_max: float = 80.0,
        sigma_min: float = 0.002,
        rho: float = 7.0,
        weight_schedule: str = "karras",
        distillation: bool = False,
        loss_norm: str = "lpips",
    ) -> None:
        self.sigma_data = sigma_data
        self.sigma_max = sigma_max
        self.sigma_min = sigma_min
        self.rho = rho
        self.weight_schedule = weight_schedule
        self.distillation = distillation
        self.loss_norm = loss_norm
        self.num_timesteps = 40

    @cached_property
    def lpips_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """LPIPS of images in [0, 1], [B]. Made when a loss first needs it: sampling needs no VGG."""
        return _UnitLPIPS(pooling="avg", dtype=torch.float32)  # as the original, also on a GPU

    def get_snr(self, sigmas: Any) -> Any:
        """1 / sigma^2 of a tensor, an array or a number."""
        return _like_its_input(lambda sigma: ops.loss_weight(sigma, "snr"), sigmas)

    def get_sigmas(self, sigmas: Tensor) -> Tensor:
        """The noise levels themselves."""
        return sigmas

    def get_scalings(self, sigma: Any) -> tuple[Any, Any, Any]:
        """c_skip, c_out, c_in of EDM, for a tensor, an array or a number."""
        return _like_its_input(Preconditioner.edm(self.sigma_data).scalings, sigma)

    def get_scalings_for_boundary_condition(self, sigma: Any) -> tuple[Any, Any, Any]:
        """c_skip, c_out, c_in of a consistency model, for a tensor, an array or a number."""
        return _like_its_input(Preconditioner.consistency(self.sigma_data, self.sigma_min).scalings, sigma)

    def denoise(
        self, model: Callable[..., Tensor], x_t: Tensor, sigmas: Tensor, **model_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """(network output, denoised) at x_t [B, ...] and sigmas [B]; model(x, timesteps, **model_kwargs).

        Raises: TypeError: the model is a `cmfast.Denoiser`.
        """
        _check_network(model)
        sigmas = sigmas if sigmas.is_floating_point() else sigmas.float()
        scalings = self.get_scalings_for_boundary_condition if self.distillation else self.get_scalings
        return denoise_with(lambda x, t: model(x, t, **model_kwargs), x_t, sigmas, scalings(sigmas))

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        sigmas: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The EDM loss at sigmas [B]: per-sample `xs_mse`, `mse` (weighted) and `loss` (= mse)."""
        student = _evaluator(self, model, model_kwargs, x_start.dtype)
        return losses.denoising_loss(student, x_start, sigmas, noise=noise, weighting=self._weights)

    def consistency_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        num_scales: int,
        model_kwargs: dict[str, Any] | None = None,
        target_model: Callable[..., Tensor] | None = None,
        teacher_model: Callable[..., Tensor] | None = None,
        teacher_diffusion: Any = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Consistency distillation (Heun steps of the teacher), or training without a teacher: per-sample `loss`.

        Raises: ValueError: no target_model, a teacher_model without teacher_diffusion, an unknown loss norm.
        """
        if target_model is None:
            raise ValueError("target_model is missing: give an average of the model, or the model itself")
        return losses.consistency_loss(
            _evaluator(self, model, model_kwargs, x_start.dtype),
            _evaluator(self, target_model, model_kwargs, x_start.dtype),
            x_start,
            num_scales,
            teacher_model=_teacher(teacher_model, teacher_diffusion, model_kwargs, x_start),
            noise=noise,
            **self._loss_options,
        )

    def progdist_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        num_scales: int,
        model_kwargs: dict[str, Any] | None = None,
        teacher_model: Callable[..., Tensor] | None = None,
        teacher_diffusion: Any = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Progressive distillation: one step of the model for two of the teacher. Per-sample `loss`.

        Raises: ValueError: no teacher_model or teacher_diffusion, an unknown loss norm.
        """
        teacher = _teacher(teacher_model, teacher_diffusion, model_kwargs, x_start)
        if teacher is None:
            raise ValueError("teacher_model is missing: progressive distillation needs one, and its teacher_diffusion")
        student = _evaluator(self, model, model_kwargs, x_start.dtype)
        return losses.progressive_distillation_loss(
            student, teacher, x_start, num_scales, noise=noise, **self._loss_options
        )

    def _weights(self, sigmas: Tensor) -> Tensor:
        return get_weightings(self.weight_schedule, self.get_snr(sigmas), self.sigma_data)

    def _perceptual(self, x: Tensor, target: Tensor) -> Tensor:
        return self.lpips_loss(unit_images(x), unit_images(target))

    @property
    def _loss_options(self) -> dict[str, Any]:
        return {
            "loss_norm": self.loss_norm,
            "lpips": self._perceptual,
            "weighting": self._weights,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "rho": self.rho,
        }


# As they are here: a subclass, an instance or a patch of the class may hold others.
_OWN_METHODS = {
    name: vars(KarrasDenoiser)[name] for name in ("denoise", "get_scalings", "get_scalings_for_boundary_condition")
}


def _evaluator(
    diffusion: Any,
    model: Callable[..., Tensor],
    model_kwargs: dict[str, Any] | None,
    dtype: torch.dtype,
    clip: bool = False,
) -> Evaluator:
    """The model as samplers and losses see it: its network, or where a method is overridden `diffusion.denoise`."""
    kwargs = model_kwargs or {}
    if isinstance(diffusion, KarrasDenoiser) and all(
        getattr(getattr(diffusion, name), "__func__", None) is own for name, own in _OWN_METHODS.items()
    ):
        _check_network(model)
        boundary = diffusion.sigma_min if diffusion.distillation else 0.0
        return Evaluator.of_network(
            lambda x, t: model(x, t, **kwargs),
            Preconditioner(diffusion.sigma_data, boundary),
            clip=clip,
            dtype=dtype,
        )
    return Evaluator(lambda x, sigma: diffusion.denoise(model, x, sigma, **kwargs)[1], clip=clip, dtype=dtype)


def _teacher(
    model: Callable[..., Tensor] | None, diffusion: Any, model_kwargs: dict[str, Any] | None, x_start: Tensor
) -> Evaluator | None:
    if model is None:
        return None
    if diffusion is None:
        raise ValueError("teacher_diffusion is missing: the KarrasDenoiser that goes with teacher_model")
    return _evaluator(diffusion, model, model_kwargs, x_start.dtype)


def karras_sample(
    diffusion: Any,
    model: Callable[..., Tensor],
    shape: Sequence[int],
    steps: int,
    clip_denoised: bool = True,
    progress: bool = False,
    callback: Callback = None,
    model_kwargs: dict[str, Any] | None = None,
    device: torch.device | str | None = None,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7.0,
    sampler: str = "heun",
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    generator: Any = None,
    ts: Sequence[int] | None = None,
) -> Tensor:
    """Images of `shape` in [-1, 1].

    Args:
        diffusion: a `KarrasDenoiser`; model(x, timesteps, **model_kwargs): of a `cmfast.Denoiser`, its `network`.
        steps: Karras levels; for `multistep` the grid that `ts` are indices of (with diffusion.rho, not rho).
        sampler: `heun`, `dpm`, `ancestral`, `onestep`, `progdist`, `euler`, `multistep`.
        generator: from `random_util.get_generator`; None: torch's own.

    Raises: ValueError: an unknown sampler, ts missing or outside the grid, a negative s_churn. TypeError: the model is
        a `cmfast.Denoiser`.
    """
    functions: dict[str, Callable[..., Tensor]] = {
        "heun": sample_heun,
        "dpm": sample_dpm,
        "ancestral": sample_euler_ancestral,
        "onestep": sample_onestep,
        "progdist": sample_progdist,
        "euler": sample_euler,
        "multistep": stochastic_iterative_sampler,
    }
    if sampler not in functions:
        raise ValueError(f"unknown sampler {sampler!r}; known: {', '.join(functions)}")
    options: dict[str, Any] = {}
    if sampler in ("heun", "dpm"):
        options = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
    elif sampler == "multistep":
        if ts is None:
            raise ValueError("ts is missing: the multistep sampler needs grid indices, such as (0, 22, 39) of steps=40")
        options = {"ts": ts, "t_min": sigma_min, "t_max": sigma_max, "rho": diffusion.rho, "steps": steps}
    if generator is None:
        generator = get_generator("dummy")

    sigmas = get_sigmas_karras(steps + (sampler == "progdist"), sigma_min, sigma_max, rho, device=device)
    noise = generator.randn(*shape, device=device)
    x, *_ = ops.init_noise(noise, torch.tensor(float(sigma_max), device=noise.device))
    denoiser = _evaluator(diffusion, model, model_kwargs, x.dtype, clip=clip_denoised)
    x = functions[sampler](denoiser, x, sigmas, generator, progress=progress, callback=callback, **options)
    return x.clamp(-1, 1)
