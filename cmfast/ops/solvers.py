"""Steps of the probability-flow ODE, from network outputs."""

import torch
from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.ops.precondition import check_step


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
    """x' = x_t + (x_t - D) / sigma (sigma' - sigma): Karras et al. 2022, algorithm 1 without its correction.

    Args: model_output, x_t [B, ...]; sigma > 0, next_sigma >= 0, scalars or [B]; clip: clamp D to [-1, 1].
    Returns x' in the dtype of x_t, the network input at (x', sigma') in `dtype` (default: that of model_output),
    and c_noise [B].
    """
    check_step(model_output, x_t, sigma, sigma_data)
    _check.sigma_level("next_sigma", next_sigma, x_t)
    return reference.euler_step(
        model_output,
        x_t,
        sigma,
        next_sigma,
        sigma_data=sigma_data,
        boundary=boundary,
        clip=clip,
        dtype=dtype,
    )


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
    """The network input at the Euler point of `next_sigma`, and c_noise [B]: the first half of a second-order step.

    The point itself is not returned: `heun_corrector` and `midpoint_corrector` recompute it.
    """
    check_step(model_output, x_t, sigma, sigma_data)
    _check.sigma_level("next_sigma", next_sigma, x_t)
    return reference.heun_predictor(
        model_output,
        x_t,
        sigma,
        next_sigma,
        sigma_data=sigma_data,
        boundary=boundary,
        clip=clip,
        dtype=dtype,
    )


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
    """x'' = x_t + (d + d') / 2 (sigma' - sigma): Karras et al. 2022, algorithm 1; Euler where sigma' = 0.

    `model_output_next` is the network's output at the input that `heun_predictor` gave. Returns as `euler_step`.
    """
    check_step(model_output, x_t, sigma, sigma_data)
    _check.float_tensor("model_output_next", model_output_next)
    _check.same_shape(x_t=x_t, model_output_next=model_output_next)
    _check.sigma_level("next_sigma", next_sigma, x_t)
    return reference.heun_corrector(
        model_output,
        model_output_next,
        x_t,
        sigma,
        next_sigma,
        sigma_data=sigma_data,
        boundary=boundary,
        clip=clip,
        dtype=dtype,
    )


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
    """x'' = x_t + d_mid (sigma' - sigma), the slope taken at the Euler point of `mid_sigma` > 0: DPM-Solver-2.

    `model_output_mid` is the network's output at the input that `heun_predictor(..., mid_sigma)` gave.
    """
    check_step(model_output, x_t, sigma, sigma_data)
    _check.float_tensor("model_output_mid", model_output_mid)
    _check.same_shape(x_t=x_t, model_output_mid=model_output_mid)
    _check.sigma_level("mid_sigma", mid_sigma, x_t, allow_zero=False)
    _check.sigma_level("next_sigma", next_sigma, x_t)
    return reference.midpoint_corrector(
        model_output,
        model_output_mid,
        x_t,
        sigma,
        mid_sigma,
        next_sigma,
        sigma_data=sigma_data,
        boundary=boundary,
        clip=clip,
        dtype=dtype,
    )
