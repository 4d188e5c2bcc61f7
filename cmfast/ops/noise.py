"""Noise: drawn from counters, added to data, and added back between sampling steps."""

import torch
from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.ops.precondition import check_step


def _check_index(index: Tensor) -> None:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.ndim != 1:
        came = f"{index.dtype} {list(index.shape)}" if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be an integer tensor [B] of sample indices, got {came}")


def normal(
    seed: int | Tensor,
    index: Tensor,
    shape: tuple[int, ...],
    *,
    draw: int | Tensor = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """N(0, 1) of shape [B, *shape] that depends on (seed, index[b], draw, element) alone: Philox4x32-10.

    Args: seed: an integer or an integer scalar tensor; index: [B] sample indices, whose device the result is on;
        draw: 0 for a sample's first draw, 1 for the next, and so on.

    >>> a = normal(7, torch.tensor([0, 1, 2]), (3, 4, 4))
    >>> b = normal(7, torch.tensor([2]), (3, 4, 4))
    >>> bool((a[2] == b[0]).all())
    True
    """
    _check_index(index)
    return reference.normal(seed, index, tuple(shape), draw=draw, dtype=dtype)


def uniform_int(seed: int | Tensor, index: Tensor, high: int, *, draw: int | Tensor = 0) -> Tensor:
    """One integer in [0, high) per sample, int64 [B], from (seed, index[b], draw) alone."""
    _check_index(index)
    if not 0 < high <= 2**31:
        raise ValueError(f"high must be from 1 to 2**31, got {high}")
    return reference.uniform_int(seed, index, high, draw=draw)


def init_noise(
    noise: Tensor, sigma: Tensor, *, sigma_data: float | None = 0.5, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x_T = sigma noise [B, ...], the first network input in `dtype`, and c_noise [B]."""
    _check.float_tensor("noise", noise)
    _check.sigma_level("sigma", sigma, noise)
    _check.sigma_data_value(sigma_data)
    return reference.init_noise(noise, sigma, sigma_data=sigma_data, dtype=dtype)


def add_noise(
    x_start: Tensor,
    noise: Tensor,
    sigma: Tensor,
    *,
    input_sigma: Tensor | None = None,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t = x_start + sigma noise [B, ...], the network input in `dtype`, and c_noise [B].

    `input_sigma`: the level of x_t where that is not sigma, because x_start was noisy already.
    """
    _check_data(x_start, noise, sigma, sigma_data)
    if input_sigma is not None:
        _check.sigma_level("input_sigma", input_sigma, x_start)
    return reference.add_noise(x_start, noise, sigma, input_sigma=input_sigma, sigma_data=sigma_data, dtype=dtype)


def add_noise_pair(
    x_start: Tensor,
    noise: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """`add_noise` at sigma and at next_sigma with one draw: both points of a pair on one trajectory."""
    _check_data(x_start, noise, sigma, sigma_data)
    _check.sigma_level("next_sigma", next_sigma, x_start)
    return reference.add_noise_pair(x_start, noise, sigma, next_sigma, sigma_data=sigma_data, dtype=dtype)


def _check_data(x_start: Tensor, noise: Tensor, sigma: Tensor, sigma_data: float | None) -> None:
    _check.float_tensor("x_start", x_start)
    _check.float_tensor("noise", noise)
    _check.same_shape(x_start=x_start, noise=noise)
    _check.sigma_level("sigma", sigma, x_start)
    _check.sigma_data_value(sigma_data)


def renoise(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    noise: Tensor,
    *,
    sigma_min: float = 0.002,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    clip: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x' = D + sqrt(sigma'^2 - sigma_min^2) noise: a step of multistep sampling, Song et al. 2023, algorithm 1.

    Returns x' in the dtype of x_t, the next network input in `dtype` (default: that of model_output), c_noise [B].
    """
    check_step(model_output, x_t, sigma, sigma_data)
    _check.float_tensor("noise", noise)
    _check.same_shape(x_t=x_t, noise=noise)
    _check.sigma_level("next_sigma", next_sigma, x_t)
    return reference.renoise(
        model_output,
        x_t,
        sigma,
        next_sigma,
        noise,
        sigma_min=sigma_min,
        sigma_data=sigma_data,
        boundary=boundary,
        clip=clip,
        dtype=dtype,
    )
