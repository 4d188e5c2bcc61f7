"""Steps of the probability-flow ODE dx/dt = (x - D(x, t)) / t: Karras et al. 2022, algorithms 1 and 2.

Each takes network outputs, not denoised images: D is recomputed from (F, x), so that a fused version never
stores it. Each returns the next network input with the next state.
"""

import torch
from torch import Tensor

from cmfast.reference._common import compute_dtype, per_sample
from cmfast.reference.precondition import _denoise, scale_input


def _slope(
    model_output: Tensor,
    x: Tensor,
    sigma: Tensor,
    sigma_data: float | None,
    boundary: float,
    clip: bool,
    wide: torch.dtype,
) -> Tensor:
    """d = (x - D) / sigma in the accumulation dtype."""
    denoised = _denoise(model_output, x, sigma, sigma_data, boundary, clip, wide)
    return (x.to(wide) - denoised) / per_sample(sigma, x, wide)


def euler_step(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    clip: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x' = x + d (sigma' - sigma) with d = (x - D) / sigma; the network input and c_noise at (x', sigma')."""
    wide = compute_dtype(model_output, x_t)
    d = _slope(model_output, x_t, sigma, sigma_data, boundary, clip, wide)
    dt = per_sample(next_sigma.to(wide) - sigma.to(wide), x_t, wide)
    x_next = (x_t.to(wide) + d * dt).to(x_t.dtype)
    return x_next, *scale_input(x_next, next_sigma, sigma_data=sigma_data, dtype=dtype or model_output.dtype)


def heun_predictor(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    clip: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The network input and c_noise at the Euler point (x', sigma'); x' itself is not kept, the corrector
    recomputes it. For the midpoint method sigma' is the midpoint."""
    wide = compute_dtype(model_output, x_t)
    d = _slope(model_output, x_t, sigma, sigma_data, boundary, clip, wide)
    dt = per_sample(next_sigma.to(wide) - sigma.to(wide), x_t, wide)
    return scale_input(x_t.to(wide) + d * dt, next_sigma, sigma_data=sigma_data, dtype=dtype or model_output.dtype)


def heun_corrector(
    model_output: Tensor,
    model_output_next: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    clip: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x'' = x + (d + d') / 2 (sigma' - sigma), d' = (x' - D') / sigma'; where sigma' = 0, the Euler step."""
    wide = compute_dtype(model_output, x_t)
    d = _slope(model_output, x_t, sigma, sigma_data, boundary, clip, wide)
    dt = per_sample(next_sigma.to(wide) - sigma.to(wide), x_t, wide)
    x_euler = x_t.to(wide) + d * dt
    # 1 stands in for sigma' = 0 so that neither the value nor a gradient is NaN in the branch not taken.
    at_zero = next_sigma == 0
    safe_sigma = torch.where(at_zero, torch.ones_like(next_sigma), next_sigma)
    d_next = _slope(model_output_next, x_euler, safe_sigma, sigma_data, boundary, clip, wide)
    d_next = torch.where(per_sample(at_zero, x_t, torch.bool), d, d_next)
    x_next = (x_t.to(wide) + 0.5 * (d + d_next) * dt).to(x_t.dtype)
    return x_next, *scale_input(x_next, next_sigma, sigma_data=sigma_data, dtype=dtype or model_output.dtype)


def midpoint_corrector(
    model_output: Tensor,
    model_output_mid: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    mid_sigma: Tensor,
    next_sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    clip: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x'' = x + d_m (sigma' - sigma), with the slope d_m at the Euler point of `mid_sigma` (DPM-Solver-2)."""
    wide = compute_dtype(model_output, x_t)
    d = _slope(model_output, x_t, sigma, sigma_data, boundary, clip, wide)
    x_mid = x_t.to(wide) + d * per_sample(mid_sigma.to(wide) - sigma.to(wide), x_t, wide)
    d_mid = _slope(model_output_mid, x_mid, mid_sigma, sigma_data, boundary, clip, wide)
    dt = per_sample(next_sigma.to(wide) - sigma.to(wide), x_t, wide)
    x_next = (x_t.to(wide) + d_mid * dt).to(x_t.dtype)
    return x_next, *scale_input(x_next, next_sigma, sigma_data=sigma_data, dtype=dtype or model_output.dtype)
