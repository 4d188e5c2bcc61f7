"""The samplers of `cm.karras_diffusion`, in its names and argument orders. Noise is drawn also where it is not used.

A denoiser is any D(x, sigma) with sigma [B], or an `Evaluator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cmfast import samplers, schedules
from cmfast.compat.openai.nn import append_dims, append_zero
from cmfast.denoiser import Evaluator

Denoise = Callable[[Tensor, Tensor], Tensor] | Evaluator
Callback = Callable[[dict[str, Any]], None] | None


def get_sigmas_karras(
    n: int, sigma_min: float, sigma_max: float, rho: float = 7.0, device: torch.device | str | None = "cpu"
) -> Tensor:
    """n Karras levels from sigma_max to sigma_min, and 0: [n + 1] float32.

    Computed in float32 on the CPU, as there: the ends are sigma_max and sigma_min but for a rounding, and where that
    leaves s_tmin or s_tmax outside, there is no churn. `schedules.karras_sigmas` has the ends exactly.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    ramp = torch.linspace(0, 1, n, dtype=torch.float32, device="cpu")
    return append_zero((high + ramp * (low - high)) ** rho).to(torch.get_default_device() if device is None else device)


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """The slope of the ODE, (x - denoised) / sigma."""
    return (x - denoised) / append_dims(sigma, x.ndim)


def get_ancestral_step(sigma_from: Any, sigma_to: Any) -> tuple[Any, Any]:
    """(sigma_down, sigma_up): `schedules.ancestral_levels`."""
    return schedules.ancestral_levels(sigma_from, sigma_to)


def evaluator_of(denoiser: Denoise, x: Tensor) -> Evaluator:
    """What the core's samplers take; a function is given inputs in the dtype of x."""
    return denoiser if isinstance(denoiser, Evaluator) else Evaluator(denoiser, dtype=x.dtype)


def _only(callback: Callback, *keys: str) -> Callback:
    """A callback that is given these entries alone."""
    if callback is None:
        return None
    return lambda info: callback({key: info[key] for key in keys})


def _reported(evaluate: Evaluator, callback: Callback, *, slope_first: bool) -> tuple[Evaluator, Callback]:
    """The model as D itself, without a fused step that never stores it, and a callback that may change x in place.

    slope_first: the step goes along the slope of before the callback, from what x is behind it; else D may be changed
    in place too, and the slope is that of both.
    """
    if callback is None:
        return evaluate, None
    denoised: Tensor
    used: Tensor

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal denoised, used
        denoised = evaluate.denoised(evaluate(*evaluate.scale_input(x, sigma)), x, sigma)
        used = denoised.clone() if slope_first else denoised
        return used

    def report(info: dict[str, Any]) -> None:
        before = info["x"].clone()
        callback({**info, "denoised": denoised})
        if slope_first:
            used.add_(info["x"] - before)  # and x - D is what it was

    return Evaluator(denoise, dtype=evaluate.dtype), report


def sample_euler_ancestral(
    model: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: Any,
    progress: bool = False,
    callback: Callback = None,
) -> Tensor:
    """Ancestral sampling with Euler steps: `samplers.sample_euler_ancestral`. A callback may change D in place."""
    evaluate, callback = _reported(evaluator_of(model, x), callback, slope_first=False)
    return samplers.sample_euler_ancestral(
        evaluate,
        x,
        sigmas,
        noise_fn=generator.randn_like,
        draw_unused=True,
        progress=progress,
        callback=callback,
    )


def sample_midpoint_ancestral(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    ts: Sequence[float] | Tensor,
    generator: Any,
    progress: bool = False,
    callback: Callback = None,
) -> Tensor:
    """Midpoint steps along a slope `model(x, t)`: `samplers.sample_midpoint_ancestral`. Draws nothing."""
    return samplers.sample_midpoint_ancestral(model, x, ts, progress=progress, callback=callback)


def sample_heun(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: Any,
    progress: bool = False,
    callback: Callback = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """Heun steps with churn: `samplers.sample_heun`."""
    evaluate, callback = _reported(evaluator_of(denoiser, x), callback, slope_first=True)
    return samplers.sample_heun(
        evaluate,
        x,
        sigmas,
        noise_fn=generator.randn_like,
        draw_unused=True,
        progress=progress,
        callback=callback,
        s_churn=s_churn,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        s_noise=s_noise,
    )


def sample_euler(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: Any,
    progress: bool = False,
    callback: Callback = None,
) -> Tensor:
    """Euler steps: `samplers.sample_euler`. Draws nothing."""
    callback = _only(callback, "x", "i", "sigma", "denoised")
    evaluate, callback = _reported(evaluator_of(denoiser, x), callback, slope_first=True)
    return samplers.sample_euler(evaluate, x, sigmas, progress=progress, callback=callback)


def sample_dpm(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: Any,
    progress: bool = False,
    callback: Callback = None,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
) -> Tensor:
    """DPM-Solver-2 steps with churn: `samplers.sample_dpm`."""
    evaluate, callback = _reported(evaluator_of(denoiser, x), callback, slope_first=True)
    return samplers.sample_dpm(
        evaluate,
        x,
        sigmas,
        noise_fn=generator.randn_like,
        draw_unused=True,
        progress=progress,
        callback=callback,
        s_churn=s_churn,
        s_tmin=s_tmin,
        s_tmax=s_tmax,
        s_noise=s_noise,
    )


def sample_onestep(
    distiller: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: Any = None,
    progress: bool = False,
    callback: Callback = None,
) -> Tensor:
    """D(x, sigmas[0]): `samplers.sample_onestep`. As in the original, callback is never called."""
    return samplers.sample_onestep(evaluator_of(distiller, x), x, sigmas)


def multistep_levels(
    ts: Sequence[int], t_min: float, t_max: float, rho: float, steps: int
) -> tuple[list[float], float]:
    """The noise levels at which the model is evaluated, and the one at which sampling ends."""
    *levels, end = schedules.multistep_sigmas(ts, steps, sigma_min=t_min, sigma_max=t_max, rho=rho, increasing=False)
    return levels, end


def stochastic_iterative_sampler(
    distiller: Denoise,
    x: Tensor,
    sigmas: Any,
    generator: Any,
    ts: Sequence[int],
    progress: bool = False,
    callback: Callback = None,
    t_min: float = 0.002,
    t_max: float = 80.0,
    rho: float = 7.0,
    steps: int = 40,
) -> Tensor:
    """Denoise at the level of each index in `ts` and add noise of the next: `samplers.sample_multistep`.

    As in the original, sigmas is not looked at and callback is never called; noise of the last level is added to the
    result, which at `steps - 1` is none.
    """
    levels, end = multistep_levels(ts, t_min, t_max, rho, steps)
    return samplers.sample_multistep(
        evaluator_of(distiller, x),
        x,
        levels,
        noise_fn=generator.randn_like,
        sigma_min=t_min,
        end_sigma=end,
        progress=progress,
    )


def sample_progdist(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    generator: Any = None,
    progress: bool = False,
    callback: Callback = None,
) -> Tensor:
    """Euler steps without the last level, which is 0: how progressively distilled models are sampled."""
    return sample_euler(denoiser, x, sigmas[:-1], generator, progress=progress, callback=callback)
