"""Steps of the probability-flow ODE, from network outputs.

Each network input is written in `dtype` (default: that of the network's output), laid out as that output is.
"""

from typing import Any

import torch
from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.ops._autograd import fused
from cmfast.ops._dispatch import plain, use_kernel
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

    Args: model_output, x_t [B, ...]; sigma > 0 and finite, next_sigma >= 0, scalars or [B], in data units; sigma_data,
        boundary: as in `scalings`; clip: clamp D to [-1, 1].
    Returns x' in the dtype of x_t, the network input at (x', sigma') in `dtype` (default: that of model_output),
    and c_noise [B].
    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> x, model_input, c_noise = euler_step(torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2), torch.tensor(1.0),
    ...                                      torch.tensor(0.0))
    >>> round(x.max().item(), 4)                # sigma' = 0 gives D = c_skip x = 0.25 / (0.998^2 + 0.25)
    0.2006
    """
    check_step(model_output, x_t, sigma, sigma_data, boundary, divides=True)
    _check.input_format(x_t, dtype, None)
    _check.sigma_level("next_sigma", next_sigma, x_t)
    options: dict[str, Any] = {"sigma_data": sigma_data, "boundary": boundary, "clip": clip, "dtype": dtype}
    inputs = model_output, x_t, sigma, next_sigma
    if use_kernel("euler_step", *inputs, dtypes=(dtype,)):
        from cmfast.kernels.solvers import euler_step_bwd, euler_step_fwd

        return fused(euler_step_fwd, euler_step_bwd, reference.euler_step, *inputs, c_noise=(2,), **options)
    return plain(reference.euler_step, *inputs, state=x_t)(*inputs, **options)


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

    The point itself is not returned: `heun_corrector` and `midpoint_corrector` recompute it. Arguments as in
    `euler_step`.

    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> x = torch.ones(1, 1, 2, 2)
    >>> model_input, c_noise = heun_predictor(torch.zeros_like(x), x, torch.tensor(1.0), torch.tensor(0.5))
    >>> model_input.shape, c_noise.shape
    (torch.Size([1, 1, 2, 2]), torch.Size([1]))
    """
    check_step(model_output, x_t, sigma, sigma_data, boundary, divides=True)
    _check.input_format(x_t, dtype, None)
    _check.sigma_level("next_sigma", next_sigma, x_t)
    options: dict[str, Any] = {"sigma_data": sigma_data, "boundary": boundary, "clip": clip, "dtype": dtype}
    inputs = model_output, x_t, sigma, next_sigma
    if use_kernel("heun_predictor", *inputs, dtypes=(dtype,)):
        from cmfast.kernels.solvers import heun_predictor_bwd, heun_predictor_fwd

        return fused(heun_predictor_fwd, heun_predictor_bwd, reference.heun_predictor, *inputs, c_noise=(1,), **options)
    return plain(reference.heun_predictor, *inputs, state=x_t)(*inputs, **options)


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

    `model_output_next` is the network's output at the input that `heun_predictor` gave. The other arguments, and what
    is returned, as in `euler_step`.

    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> x = torch.ones(1, 1, 2, 2)
    >>> heun_corrector(torch.zeros_like(x), torch.zeros_like(x), x, torch.tensor(1.0), torch.tensor(0.5))[0].shape
    torch.Size([1, 1, 2, 2])
    """
    check_step(model_output, x_t, sigma, sigma_data, boundary, divides=True)
    _check.input_format(x_t, dtype, None)
    _check.float_tensor("model_output_next", model_output_next)
    _check.same_shape(x_t=x_t, model_output_next=model_output_next)
    _check.sigma_level("next_sigma", next_sigma, x_t)
    options: dict[str, Any] = {"sigma_data": sigma_data, "boundary": boundary, "clip": clip, "dtype": dtype}
    inputs = model_output, model_output_next, x_t, sigma, next_sigma
    if use_kernel("heun_corrector", *inputs, dtypes=(dtype,)):
        from cmfast.kernels.solvers import heun_corrector_bwd, heun_corrector_fwd

        return fused(heun_corrector_fwd, heun_corrector_bwd, reference.heun_corrector, *inputs, c_noise=(2,), **options)
    return plain(reference.heun_corrector, *inputs, state=x_t)(*inputs, **options)


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

    `model_output_mid` is the network's output at the input that `heun_predictor(..., mid_sigma)` gave. The other
    arguments, and what is returned, as in `euler_step`.

    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> x, zero = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    >>> midpoint_corrector(zero, zero, x, torch.tensor(1.0), torch.tensor(0.7), torch.tensor(0.5))[0].shape
    torch.Size([1, 1, 2, 2])
    """
    check_step(model_output, x_t, sigma, sigma_data, boundary, divides=True)
    _check.input_format(x_t, dtype, None)
    _check.float_tensor("model_output_mid", model_output_mid)
    _check.same_shape(x_t=x_t, model_output_mid=model_output_mid)
    _check.sigma_level("mid_sigma", mid_sigma, x_t, divides=True)
    _check.sigma_level("next_sigma", next_sigma, x_t)
    options: dict[str, Any] = {"sigma_data": sigma_data, "boundary": boundary, "clip": clip, "dtype": dtype}
    inputs = model_output, model_output_mid, x_t, sigma, mid_sigma, next_sigma
    if use_kernel("midpoint_corrector", *inputs, dtypes=(dtype,)):
        from cmfast.kernels.solvers import midpoint_corrector_bwd, midpoint_corrector_fwd

        kernels = midpoint_corrector_fwd, midpoint_corrector_bwd
        return fused(*kernels, reference.midpoint_corrector, *inputs, c_noise=(2,), **options)
    return plain(reference.midpoint_corrector, *inputs, state=x_t)(*inputs, **options)
