"""Preconditioning: from the state to the network's input, and from its output to D."""

from typing import Any

import torch
from torch import Tensor

from cmfast import reference
from cmfast.ops import _check
from cmfast.ops._autograd import fused
from cmfast.ops._dispatch import plain, use_kernel
from cmfast.ops.images import ROUNDINGS


def scalings(
    sigma: Tensor, *, sigma_data: float | None = 0.5, boundary: float = 0.002
) -> tuple[Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in at noise levels `sigma` (any shape): Song et al. 2023, appendix C.

    `boundary` is the level at which D is the identity: sigma_min for a consistency model, 0 for EDM.

    >>> c_skip, c_out, c_in = scalings(torch.tensor([0.002, 80.0]))
    >>> c_skip[0].item(), c_out[0].item()
    (1.0, 0.0)

    Raises:
        TypeError: sigma is not a floating tensor.
        ValueError: sigma_data is not positive.
    """
    _check.float_tensor("sigma", sigma, min_ndim=0)
    _check.sigma_data_value(sigma_data)
    _check.number("boundary", boundary)
    return reference.scalings(sigma, sigma_data=sigma_data, boundary=boundary)


def c_noise(sigma: Tensor, *, sigma_data: float | None = 0.5) -> Tensor:
    """The time the network is given, 250 ln(sigma + 1e-44); shape of `sigma`. With sigma_data=None sigma itself.

    Raises: TypeError: sigma is not a floating tensor.

    >>> c_noise(torch.tensor([1.0, 80.0]))
    tensor([   0.0000, 1095.5066])
    """
    _check.float_tensor("sigma", sigma, min_ndim=0)
    return reference.c_noise(sigma, sigma_data=sigma_data)


def scale_input(
    x: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Tensor, Tensor]:
    """The network's input c_in(sigma) x, [B, ...] in `dtype` (default: that of x), and c_noise [B].

    Args: x [B, ...] state; sigma scalar or [B], in data units; sigma_data: None for a network that is D itself;
        memory_format: of the input (default: as x lies).
    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> model_input, c_noise = scale_input(torch.full((1, 3, 8, 8), 80.0), torch.tensor([80.0]))
    >>> round(model_input.max().item(), 4), round(c_noise.item(), 1)
    (1.0, 1095.5)
    """
    _check.float_tensor("x", x)
    _check.sigma_level("sigma", sigma, x)
    _check.sigma_data_value(sigma_data)
    _check.input_format(x, dtype, memory_format)
    options: dict[str, Any] = {"sigma_data": sigma_data, "dtype": dtype, "memory_format": memory_format}
    if use_kernel("scale_input", x, sigma, dtypes=(dtype,)):
        from cmfast.kernels.precondition import scale_input_bwd, scale_input_fwd

        return fused(scale_input_fwd, scale_input_bwd, reference.scale_input, x, sigma, c_noise=(1,), **options)
    return plain(reference.scale_input, x, sigma, state=x)(x, sigma, **options)


def check_step(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    sigma_data: float | None,
    boundary: float,
    *,
    divides: bool = False,
) -> None:
    """What every operation from a network output checks first. divides: whether it does so by sigma."""
    _check.float_tensor("x_t", x_t)
    _check.float_tensor("model_output", model_output)
    _check.same_shape(x_t=x_t, model_output=model_output)
    _check.sigma_level("sigma", sigma, x_t, divides=divides)
    _check.sigma_data_value(sigma_data)
    _check.number("boundary", boundary)


def denoise(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    clip: bool = False,
) -> Tensor:
    """D = c_skip(sigma) x_t + c_out(sigma) F: Song et al. 2023, eq. 5. [B, ...] in the dtype of x_t.

    Args: model_output F [B, ...]; x_t [B, ...]; sigma scalar or [B], in data units; sigma_data, boundary: as in
        `scalings`; clip: clamp D to [-1, 1].
    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range; the message names it.

    >>> x = torch.randn(2, 3, 8, 8)
    >>> bool((denoise(torch.randn_like(x), x, torch.tensor(0.002)) == x).all())
    True
    """
    check_step(model_output, x_t, sigma, sigma_data, boundary)
    inputs = model_output, x_t, sigma
    options: dict[str, Any] = {"sigma_data": sigma_data, "boundary": boundary, "clip": clip}
    if use_kernel("denoise", x_t, model_output, sigma):
        from cmfast.kernels.precondition import denoise_bwd, denoise_fwd

        return fused(denoise_fwd, denoise_bwd, reference.denoise, *inputs, **options)
    return plain(reference.denoise, *inputs, state=x_t)(*inputs, **options)


def denoise_to_uint8(
    model_output: Tensor,
    x_t: Tensor,
    sigma: Tensor,
    *,
    sigma_data: float | None = 0.5,
    boundary: float = 0.002,
    rounding: str = "trunc",
) -> Tensor:
    """`denoise`, clamped, as pixels: uint8 [B, H, W, C] from [B, C, H, W]. `rounding` as in `to_uint8`; the rest as in
    `denoise`.

    Raises: TypeError, ValueError: an argument of the wrong type, shape, device or range, or an unknown rounding.

    >>> x = torch.full((1, 3, 2, 2), 0.5)
    >>> denoise_to_uint8(torch.zeros_like(x), x, torch.tensor(0.002)).unique().tolist()
    [191]
    """
    check_step(model_output, x_t, sigma, sigma_data, boundary)
    if x_t.ndim < 2:
        raise ValueError(f"x_t must be a batch [B, C, ...] of 2 or more dimensions, got {list(x_t.shape)}")
    _check.choice("rounding", rounding, ROUNDINGS)
    options: dict[str, Any] = {"sigma_data": sigma_data, "boundary": boundary, "rounding": rounding}
    if use_kernel("denoise_to_uint8", x_t, model_output, sigma):
        from cmfast.kernels.precondition import denoise_to_uint8_fwd

        return denoise_to_uint8_fwd(model_output.detach(), x_t.detach(), sigma.detach(), **options)
    inputs = model_output.detach(), x_t.detach(), sigma.detach()
    return plain(reference.denoise_to_uint8, *inputs, state=inputs[1])(*inputs, **options)
